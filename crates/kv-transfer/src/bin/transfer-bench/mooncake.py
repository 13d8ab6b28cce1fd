import ctypes
import mmap
import sys

from mooncake.engine import TransferEngine


def say(line):
    print("tandem: " + line, flush=True)


def memory(size):
    # Private memory with huge pages, written to once, as on the other sides of this bench.
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    ctypes.memset(address, 7, size)
    return area, address


role, size = sys.argv[1], int(sys.argv[2])
engine = TransferEngine()
if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
    sys.exit("no engine")
area, own = memory(size)
if engine.register_memory(own, size) != 0:
    sys.exit("no memory")
if role == "owner":
    say(f"127.0.0.1:{engine.get_rpc_port()} {own}")
    sys.stdin.read()
else:
    peer, theirs = sys.argv[3], int(sys.argv[4])
    say("ready")
    for line in sys.stdin:
        start, length, *places = map(int, line.split())
        sources = [theirs + start + i * length for i in range(len(places))]
        targets = [own + place for place in places]
        failed = engine.batch_transfer_sync_read(peer, targets, sources, [length] * len(places))
        say("done" if failed == 0 else f"it says {failed}")
