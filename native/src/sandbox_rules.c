/*
 * What each class of thread may ask the kernel for.
 *
 * Lists of what is allowed, never of what is not: a system call that Linux gets next year is
 * refused.  Conditions look at argument values only, for a filter cannot follow pointers; where
 * the kernel takes an int, the upper half of the register means nothing and is masked out.
 */
#include "sandbox_rules.h"
#include <linux/fs.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#endif
#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

#define INT UINT64_C(0xffffffff)
#define ANY(name) {SYS_##name, 0, 0, 0}
#define IF_INT(name, arg, value) {SYS_##name, arg, INT, (uint32_t)(value)}
#define IF_BITS(name, arg, mask, value) {SYS_##name, arg, mask, value}
#define IOCTL(request) IF_INT(ioctl, 1, request)
#define RULES(list) {list, sizeof(list) / sizeof((list)[0])}

#define NAMESPACES                                                                                 \
    (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID |  \
     CLONE_NEWNET | CLONE_NEWTIME)

/* Memory, locks, time and its own end: what any thread does. */
static const struct sandbox_rule common[] = {
    ANY(read),
    ANY(write),
    ANY(close),
    ANY(futex),
    ANY(exit),
    ANY(exit_group),
    ANY(restart_syscall),
    ANY(rt_sigreturn),
    ANY(rt_sigprocmask),
    ANY(sigaltstack),
    ANY(gettid),
    ANY(getpid),
    ANY(brk),
    ANY(munmap),
    ANY(mremap),
    ANY(madvise),
    IF_BITS(mmap, 2, PROT_EXEC, 0),
    IF_BITS(mprotect, 2, PROT_EXEC, 0),
    ANY(sched_yield),
    ANY(getcpu),
    ANY(sched_getaffinity),
    ANY(clock_gettime),
    ANY(clock_getres),
    ANY(clock_nanosleep),
    ANY(nanosleep),
    ANY(gettimeofday),
    ANY(time),
    ANY(getrandom),
    ANY(membarrier),
    ANY(rseq),
    ANY(set_robust_list),
    IF_INT(prctl, 0, PR_SET_NAME),
    IF_INT(prctl, 0, PR_GET_NAME),
    IF_INT(prctl, 0, PR_SET_VMA),
};

/* Run, look at and set the state of one vCPU, raise an interrupt.  Events are eventfds. */
static const struct sandbox_rule vcpu[] = {
    IOCTL(KVM_RUN),
    IOCTL(KVM_IRQ_LINE),
    IOCTL(KVM_SIGNAL_MSI),
    IOCTL(KVM_NMI),
    IOCTL(KVM_KVMCLOCK_CTRL),
    IOCTL(KVM_GET_REGS),
    IOCTL(KVM_SET_REGS),
    IOCTL(KVM_GET_SREGS),
    IOCTL(KVM_SET_SREGS),
    IOCTL(KVM_GET_FPU),
    IOCTL(KVM_SET_FPU),
    IOCTL(KVM_GET_MSRS),
    IOCTL(KVM_SET_MSRS),
    IOCTL(KVM_GET_LAPIC),
    IOCTL(KVM_SET_LAPIC),
    IOCTL(KVM_GET_XSAVE),
    IOCTL(KVM_SET_XSAVE),
    IOCTL(KVM_GET_XCRS),
    IOCTL(KVM_SET_XCRS),
    IOCTL(KVM_GET_DEBUGREGS),
    IOCTL(KVM_SET_DEBUGREGS),
    IOCTL(KVM_GET_VCPU_EVENTS),
    IOCTL(KVM_SET_VCPU_EVENTS),
    IOCTL(KVM_GET_MP_STATE),
    IOCTL(KVM_SET_MP_STATE),
    IOCTL(KVM_GET_TSC_KHZ),
    IOCTL(KVM_SET_TSC_KHZ),
    IOCTL(KVM_GET_NESTED_STATE),
    IOCTL(KVM_SET_NESTED_STATE),
};

/* Read and write what is open already, and start the worker threads of a disk.  Its io_uring was
 * set up before it entered; a ring takes no other from here. */
static const struct sandbox_rule iothread[] = {
    ANY(readv),
    ANY(writev),
    ANY(pread64),
    ANY(pwrite64),
    ANY(preadv),
    ANY(pwritev),
    ANY(preadv2),
    ANY(pwritev2),
    ANY(lseek),
    ANY(fsync),
    ANY(fdatasync),
    ANY(sync_file_range),
    ANY(fallocate),
    ANY(fadvise64),
    ANY(sendmsg),
    ANY(recvmsg),
    ANY(sendto),
    ANY(recvfrom),
    ANY(shutdown),
    ANY(epoll_wait),
    ANY(epoll_pwait),
    ANY(epoll_ctl),
    ANY(poll),
    ANY(ppoll),
    ANY(timerfd_settime),
    ANY(eventfd2),
    ANY(io_uring_enter),
    IOCTL(BLKDISCARD),
    IOCTL(BLKZEROOUT),
    IOCTL(BLKSECDISCARD),
    IF_BITS(clone, 0, NAMESPACES | CLONE_VM | CLONE_THREAD, CLONE_VM | CLONE_THREAD),
    IF_INT(seccomp, 0, SECCOMP_SET_MODE_FILTER),
};

/* Python and its event loop.  Which files it can open is Landlock's and the root's to say; which
 * sockets it can make, the configuration's. */
static const struct sandbox_rule control[] = {
    /* files */
    ANY(open),
    ANY(openat),
    ANY(creat),
    ANY(stat),
    ANY(lstat),
    ANY(fstat),
    ANY(newfstatat),
    ANY(statx),
    ANY(statfs),
    ANY(fstatfs),
    ANY(access),
    ANY(faccessat),
    ANY(faccessat2),
    ANY(readlink),
    ANY(readlinkat),
    ANY(getdents),
    ANY(getdents64),
    ANY(getcwd),
    ANY(fcntl),
    ANY(flock),
    ANY(dup),
    ANY(dup2),
    ANY(dup3),
    ANY(close_range),
    ANY(pipe),
    ANY(pipe2),
    ANY(unlink),
    ANY(unlinkat),
    ANY(rename),
    ANY(renameat),
    ANY(renameat2),
    ANY(link),
    ANY(linkat),
    ANY(mkdir),
    ANY(mkdirat),
    ANY(rmdir),
    ANY(truncate),
    ANY(ftruncate),
    ANY(chmod),
    ANY(fchmod),
    ANY(fchmodat),
    ANY(utimensat),
    ANY(umask),
    ANY(sendfile),
    ANY(copy_file_range),
    ANY(splice),
    ANY(memfd_create),
    ANY(syncfs),
    /* memory */
    ANY(mlock),
    ANY(mlock2),
    ANY(munlock),
    ANY(msync),
    ANY(mincore),
    /* sockets */
    IF_INT(socketpair, 0, AF_UNIX),
    ANY(bind),
    ANY(listen),
    ANY(accept),
    ANY(accept4),
    ANY(connect),
    ANY(getsockname),
    ANY(getpeername),
    ANY(getsockopt),
    ANY(setsockopt),
    ANY(sendmmsg),
    ANY(recvmmsg),
    /* waiting */
    ANY(epoll_create),
    ANY(epoll_create1),
    ANY(epoll_pwait2),
    ANY(select),
    ANY(pselect6),
    ANY(pause),
    ANY(timerfd_create),
    ANY(timerfd_gettime),
    ANY(signalfd4),
    ANY(setitimer),
    ANY(getitimer),
    ANY(times),
    ANY(getrusage),
    ANY(io_uring_register),
    /* threads, signals */
    ANY(wait4),
    ANY(waitid),
    ANY(rt_sigpending),
    ANY(rt_sigtimedwait),
    ANY(rt_sigsuspend),
    ANY(set_tid_address),
    ANY(get_robust_list),
    ANY(sched_setaffinity),
    ANY(sched_getparam),
    ANY(sched_getscheduler),
    ANY(sched_get_priority_max),
    ANY(sched_get_priority_min),
    ANY(getpriority),
    /* itself */
    ANY(getuid),
    ANY(geteuid),
    ANY(getgid),
    ANY(getegid),
    ANY(getresuid),
    ANY(getresgid),
    ANY(getgroups),
    ANY(getppid),
    ANY(getpgrp),
    ANY(getpgid),
    ANY(getsid),
    ANY(uname),
    ANY(sysinfo),
    ANY(capget),
    ANY(getrlimit),
    IF_BITS(prlimit64, 2, UINT64_MAX, 0),
    IF_INT(prctl, 0, PR_GET_DUMPABLE),
    IF_INT(prctl, 0, PR_GET_NO_NEW_PRIVS),
    IF_INT(prctl, 0, PR_CAPBSET_READ),
    /* descriptors, terminals (no TIOCSTI), disks, taps, the machine */
    IOCTL(FIONBIO),
    IOCTL(FIONREAD),
    IOCTL(FIOCLEX),
    IOCTL(FIONCLEX),
    IOCTL(FICLONE),
    IOCTL(FICLONERANGE),
    IOCTL(TCGETS),
    IOCTL(TCSETS),
    IOCTL(TCSETSW),
    IOCTL(TCSETSF),
    IOCTL(TCFLSH),
    IOCTL(TIOCGWINSZ),
    IOCTL(TIOCGPGRP),
    IOCTL(BLKGETSIZE64),
    IOCTL(BLKSSZGET),
    IOCTL(BLKPBSZGET),
    IOCTL(BLKROGET),
    IOCTL(TUNGETIFF),
    IOCTL(TUNGETFEATURES),
    IOCTL(TUNSETIFF),
    IOCTL(TUNSETQUEUE),
    IOCTL(TUNSETOFFLOAD),
    IOCTL(TUNGETVNETHDRSZ),
    IOCTL(TUNSETVNETHDRSZ),
    IOCTL(TUNGETVNETLE),
    IOCTL(TUNSETVNETLE),
    IOCTL(TUNSETCARRIER),
    IOCTL(KVM_CREATE_VM), /* a reset makes a new one */
    IOCTL(KVM_CREATE_IRQCHIP),
    IOCTL(KVM_CREATE_VCPU),
    IOCTL(KVM_SET_TSS_ADDR),
    IOCTL(KVM_SET_IDENTITY_MAP_ADDR),
    IOCTL(KVM_REGISTER_COALESCED_MMIO),
    IOCTL(KVM_GET_VCPU_MMAP_SIZE),
    IOCTL(KVM_CHECK_EXTENSION),
    IOCTL(KVM_GET_SUPPORTED_CPUID),
    IOCTL(KVM_GET_MSR_INDEX_LIST),
    IOCTL(KVM_SET_CPUID2),
    IOCTL(KVM_GET_CPUID2),
    IOCTL(KVM_SET_SIGNAL_MASK),
    IOCTL(KVM_ENABLE_CAP),
    IOCTL(KVM_SET_GSI_ROUTING),
    IOCTL(KVM_SET_USER_MEMORY_REGION),
    IOCTL(KVM_GET_DIRTY_LOG),
    IOCTL(KVM_CLEAR_DIRTY_LOG),
    IOCTL(KVM_IRQFD),
    IOCTL(KVM_IOEVENTFD),
    IOCTL(KVM_GET_IRQCHIP),
    IOCTL(KVM_SET_IRQCHIP),
    IOCTL(KVM_GET_PIT2),
    IOCTL(KVM_SET_PIT2),
    IOCTL(KVM_GET_CLOCK),
    IOCTL(KVM_SET_CLOCK),
    IOCTL(KVM_GET_XSAVE2),
};

const struct sandbox_rules rules_of_all = RULES(common);
const struct sandbox_rules rules_of_class[SANDBOX_CLASSES] = {
    [SANDBOX_CONTROL] = RULES(control),
    [SANDBOX_IOTHREAD] = RULES(iothread),
    [SANDBOX_VCPU] = RULES(vcpu),
};
