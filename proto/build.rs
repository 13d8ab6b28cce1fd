//! Compiles the messages with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["common.proto", "worker.proto", "lender.proto", "store.proto", "membership.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    // Every event of every frame would be as large as the one grant of a request.
    let handle = ".tandem.v1.Granted.handle";
    tonic_prost_build::configure().bytes(".").boxed(handle).compile_fds(descriptors)?;
    Ok(())
}
