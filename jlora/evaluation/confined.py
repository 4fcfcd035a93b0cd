"""The process in which a candidate runs: `python -I confined.py PROGRAM RESULT_FD TOKEN LIMITS`, standard library alone.

It shuts itself in and then runs the program in itself, so that what it can do is bounded whatever the program is:

- resource limits: processor time, address space, size of a file, open files;
- a network namespace without any network, where the system allows one (user namespaces);
- a seccomp filter (Linux on x86-64 and arm64): no sockets, no other processes (threads are let through), no leaving the process
  group, no signals or tracing of others;
- Landlock (Linux 5.13): nothing is written outside the working directory;
- where there is no seccomp filter: no processes by limit (root is exempt from it), and an audit hook of Python, which a program
  that means harm gets around.

RESULT_FD gets two lines of JSON: which of these are in force, and how the program ended. The second has TOKEN, so that a program
that ends the process early has not passed.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # sched.h: CLONE_NEWUSER, CLONE_NEWNET
_THREAD = 0x00010000  # CLONE_THREAD
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # sys/prctl.h, linux/seccomp.h
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000  # linux/seccomp.h: SECCOMP_RET_*
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = (
    0x20,
    0x15,
    0x35,
    0x45,
    0x06,
)  # linux/bpf_common.h: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|…
_X32 = 0x40000000  # asm/unistd.h: __X32_SYSCALL_BIT, x86-64's calls under other numbers

# machine -> (AUDIT_ARCH_*, calls that are refused, and those that are let through by their first argument); asm/unistd.h.
_CALLS = {
    "x86_64": (
        0xC000003E,
        {"socket": 41, "fork": 57, "vfork": 58, "ptrace": 101, "setpgid": 109, "setsid": 112, "rt_sigqueueinfo": 129, "tkill": 200,
         "unshare": 272, "setns": 308, "process_vm_writev": 311, "pidfd_send_signal": 424, "io_uring_setup": 425},
        {"clone": 56, "kill": 62, "tgkill": 234},
    ),
    "aarch64": (
        0xC00000B7,
        {"unshare": 97, "ptrace": 117, "tkill": 130, "rt_sigqueueinfo": 138, "setpgid": 154, "setsid": 157, "socket": 198,
         "setns": 268, "process_vm_writev": 271, "pidfd_send_signal": 424, "io_uring_setup": 425},
        {"clone": 220, "kill": 129, "tgkill": 131},
    ),
}  # fmt: skip
_CLONE3 = 435

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))
"""linux/landlock.h: WRITE_FILE, REMOVE_DIR, REMOVE_FILE, and MAKE_* of the first version."""
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14  # the latter since the third version

_HOOKED = (
    "socket.",
    "os.fork",
    "os.posix_spawn",
    "os.exec",
    "os.spawn",
    "os.system",
    "os.kill",
    "subprocess.",
    "ctypes.",
    "pty.",
)


def confine(limits: dict) -> dict:
    """Shuts the process in; what is in force, by what it bounds."""
    size, cpu = limits["megabytes"] << 20, int(limits["seconds"]) + 1
    for name, value in (("CPU", cpu), ("AS", size), ("FSIZE", 16 << 20), ("NOFILE", 64), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    namespace = _called(lambda libc: libc.unshare(_NEW_USER | _NEW_NET))
    files = _landlock()
    seccomp = _seccomp()
    if not seccomp:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        sys.addaudithook(_refuse)
    hook = [] if seccomp else ["audit hook"]
    return {
        "network": (["network namespace"] if namespace else []) + (["seccomp"] if seccomp else hook),
        "processes": ["seccomp"] if seccomp else ["RLIMIT_NPROC", *hook],
        "memory": ["RLIMIT_AS"],
        "files": ["Landlock"] if files else [],
    }


def _called(call) -> bool:
    """Whether a system call is there and was done."""
    try:
        return call(ctypes.CDLL(None, use_errno=True)) == 0
    except (AttributeError, OSError):
        return False


def _seccomp() -> bool:
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return False
    program = _filter(*_CALLS[platform.machine()])
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))

    made = Program(len(program), ctypes.addressof(packed))
    return _called(lambda libc: libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)) and _called(
        lambda libc: libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(made), 0, 0)
    )


def _filter(machine: int, refused: dict, by_argument: dict) -> list:
    """Lines (code, lines to skip if so, if not, constant) of a classic BPF program over `struct seccomp_data`: number at 0, machine
    at 4, first argument at 16."""
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    lines += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for number in refused.values():
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    # glibc then takes `clone`, whose flags can be looked at.
    lines += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    tests = {"clone": (_ANY_BIT, _THREAD), "kill": (_EQUAL, os.getpid()), "tgkill": (_EQUAL, os.getpid())}
    for name, number in by_argument.items():
        code, value = tests[name]
        lines += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, 16), (code, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        lines += [(_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    return [*lines, (_RETURN, 0, 0, _ALLOW)]


def _landlock() -> bool:
    """Writing is for the working directory, and for /dev/null."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    writes = _WRITES | (_TRUNCATE if version >= 3 else 0)
    handled = struct.pack("=Q", writes)
    rules = libc.syscall(_LANDLOCK_CREATE, handled, len(handled), 0)
    if rules < 0:
        return False
    for path, allowed in ((".", writes), ("/dev/null", writes & (_WRITE_FILE | _TRUNCATE))):
        place = os.open(path, os.O_PATH)
        done = libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
        if done:
            return False
    done = libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return done


def _refuse(event: str, arguments: tuple) -> None:
    if event.startswith(_HOOKED):
        raise PermissionError(f"a candidate may not do this: {event}")


def main() -> None:
    path, result, token, limits = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        source = file.read()
    sys.argv[1:] = []
    stream = os.fdopen(int(result), "w", encoding="utf-8")
    stream.write(json.dumps(confine(json.loads(limits))) + "\n")
    stream.flush()
    try:
        exec(compile(source, "candidate.py", "exec"), {"__name__": "__main__"})
        said = "passed"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:300]
    stream.write(json.dumps({"token": token, "said": said}) + "\n")
    stream.flush()
    os._exit(0)  # threads that are still running are not waited for


if __name__ == "__main__":
    main()
