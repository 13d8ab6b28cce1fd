//! The allocator of our processes, and how it is set.
//!
//! jemalloc, for what it keeps of what is freed: it fills the lowest room first, in small pages, and a thread of its
//! own gives back within about a second what nobody has used since. One arena: threads share what is free, and meet
//! at its locks only when their own caches are empty or full.

/// See [`crate::allocator`].
#[doc(hidden)]
pub use tikv_jemallocator::Jemalloc;

/// Makes jemalloc the allocator of the program in whose root this stands.
#[macro_export]
macro_rules! allocator {
    () => {
        #[global_allocator]
        static ALLOCATOR: $crate::allocator::Jemalloc = $crate::allocator::Jemalloc;

        // SAFETY: jemalloc looks for a pointer to a C string by this name, nobody else defines it, and it is not
        // changed.
        #[unsafe(export_name = "_rjem_malloc_conf")]
        static ALLOCATOR_OPTIONS: ::std::sync::atomic::AtomicPtr<::std::ffi::c_char> =
            ::std::sync::atomic::AtomicPtr::new($crate::allocator::OPTIONS.as_ptr().cast_mut());
    };
}

/// Read before anything else runs.
#[doc(hidden)]
pub const OPTIONS: &std::ffi::CStr =
    c"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,narenas:1,tcache_max:4096";
