"""A sandbox for untrusted Python programs. `api` is what others use; one file per layer of what confines a program.

api.py         run_python, available_protections
supervisor.py  the forked process that confines the program, starts it and ends it in time
limits.py      memory, files, threads: resource limits
namespaces.py  a root of its own, read-only; no network, no other processes
landlock.py    which files may be read and written
seccomp.py     which system calls are refused; syscall_numbers.py has their table
kernel.py      calls into the kernel that Python does not offer
"""
