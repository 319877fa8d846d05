/* System calls that no class of thread may make, one act each. */
#ifndef FORBIDDEN_H
#define FORBIDDEN_H

#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int do_execve(void)
{
    char *argv[] = {"true", NULL};
    return execve("/bin/true", argv, argv + 1);
}

static int do_fork(void)
{
    return (int)syscall(SYS_fork);
}

static int do_clone_process(void)
{
    return (int)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
}

static int do_socket_inet(void)
{
    return socket(AF_INET, SOCK_STREAM, 0);
}

static int do_socket_packet(void)
{
    return socket(AF_PACKET, SOCK_RAW, 0);
}

static int do_ptrace(void)
{
    return (int)ptrace(PTRACE_TRACEME, 0, NULL, NULL);
}

static int do_process_vm(void)
{
    return (int)process_vm_readv(1, NULL, 0, NULL, 0, 0);
}

static int do_mount(void)
{
    return mount("none", "/tmp", "tmpfs", 0, NULL);
}

static int do_unshare(void)
{
    return unshare(CLONE_NEWUSER);
}

static int do_setuid(void)
{
    return (int)syscall(SYS_setuid, 0);
}

static int do_kill_parent(void)
{
    return (int)syscall(SYS_kill, (pid_t)syscall(SYS_getppid), 0);
}

static int do_kill_group(void)
{
    return (int)syscall(SYS_kill, 0, 0);
}

static int do_kill_other(void)
{
    return (int)syscall(SYS_kill, 1, 0);
}

static int do_tgkill_other(void)
{
    return (int)syscall(SYS_tgkill, 1, 1, 0);
}

static int do_bpf(void)
{
    return (int)syscall(SYS_bpf, 0, NULL, 0);
}

static int do_keyctl(void)
{
    return (int)syscall(SYS_keyctl, 0, 0, 0, 0, 0);
}

static int do_perf(void)
{
    return (int)syscall(SYS_perf_event_open, NULL, 0, 0, 0, 0);
}

static int do_init_module(void)
{
    return (int)syscall(SYS_init_module, NULL, 0, "");
}

static int do_userfaultfd(void)
{
    return (int)syscall(SYS_userfaultfd, 0);
}

static int do_setns(void)
{
    return (int)syscall(SYS_setns, 0, 0);
}

static int do_personality(void)
{
    return (int)syscall(SYS_personality, 0);
}

static int do_prlimit(void)
{
    uint64_t limit[2] = {0, 0};
    return (int)syscall(SYS_prlimit64, 0, 4, limit, NULL);
}

static int do_dumpable(void)
{
    return prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
}

static int do_tiocsti(void)
{
    return ioctl(0, TIOCSTI, "x");
}

static int do_handler(void)
{
    return (int)syscall(SYS_rt_sigaction, SIGSYS, NULL, NULL, 8);
}

static const struct forbidden {
    const char *call;
    int (*act)(void);
} forbidden[] = {
    {"execve", do_execve},
    {"fork", do_fork},
    {"clone", do_clone_process},
    {"socket", do_socket_inet},
    {"socket", do_socket_packet},
    {"ptrace", do_ptrace},
    {"process_vm_readv", do_process_vm},
    {"mount", do_mount},
    {"unshare", do_unshare},
    {"setuid", do_setuid},
    {"kill", do_kill_other},
    {"kill", do_kill_group},
    {"tgkill", do_tgkill_other},
    {"bpf", do_bpf},
    {"keyctl", do_keyctl},
    {"perf_event_open", do_perf},
    {"init_module", do_init_module},
    {"userfaultfd", do_userfaultfd},
    {"setns", do_setns},
    {"personality", do_personality},
    {"prlimit64", do_prlimit},
    {"prctl", do_dumpable},
    {"ioctl", do_tiocsti},
    {"rt_sigaction", do_handler},
};

#endif
