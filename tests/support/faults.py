"""Commands that are killed, or refused by the disk, at one of their calls of the file system."""

from __future__ import annotations

# What changes files or directories; of `open`, only for writing. `argv`: which call, and what happens there.
SCRIPT = """
import errno, os, signal, sys
at, what, seen = int(sys.argv.pop(1)), sys.argv.pop(1), 0
def watched(name, real):
    def call(*arguments, **named):
        global seen
        if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return real(*arguments, **named)
        seen += 1
        if seen == at and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if seen == at:
            raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)))
        return real(*arguments, **named)
    return call
for name in ("open", "pwrite", "write", "fsync", "ftruncate", "posix_fallocate", "mkdir", "rename", "replace", "link",
             "unlink", "rmdir"):
    setattr(os, name, watched(name, getattr(os, name)))
from r2m.commands.main import main
code = main(sys.argv[1:])
print("calls", seen)
sys.exit(code)
"""
