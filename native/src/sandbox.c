/*
 * Filters: made once when the process is sealed, put on by each thread as it starts.
 *
 * libseccomp compiles the rules; the programs are kept, so that a thread needs one system call to
 * enter and no allocation.  A filter holds for the calling thread and those that it starts.
 *
 * A forbidden call raises SIGSYS, whose handler says which and ends the process: a thread that a
 * guest took over must not go on.  Where the handler cannot run (the signal blocked), the kernel
 * ends the process itself.
 */
#include "libsandbox.h"
#include "sandbox_rules.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CALLS = 512, LAST_SIGNAL = 64 };

static const char *const class_name[SANDBOX_CLASSES] = {"control", "iothread", "vcpu"};
static struct sock_fprog program[SANDBOX_CLASSES];
/* Resolved beforehand: libseccomp allocates, which a signal handler may not. */
static char *call_name[CALLS];
static atomic_bool sealed;
/* A thread that never entered is as its creator, and threads of unknown class are Python's.
 * Initial-exec, since the handler reads it: other models may allocate on first use. */
static _Thread_local enum sandbox_class entered __attribute__((tls_model("initial-exec")));

/* ---- the end ---- */

static void on_sigsys(int sig, siginfo_t *info, void *context)
{
    char number[12], *digit = number + sizeof(number);
    unsigned nr = (unsigned)info->si_syscall;
    const char *name = nr < CALLS && call_name[nr] ? call_name[nr] : "unknown";
    const char *part[] = {"vdev: a thread of class ",
                          class_name[entered],
                          " made the forbidden system call ",
                          name,
                          " (",
                          NULL,
                          "): the process ends\n"};
    char line[160];
    size_t len = 0;

    (void)sig;
    (void)context;
    *--digit = '\0';
    do {
        *--digit = (char)('0' + nr % 10);
        nr /= 10;
    } while (nr);
    part[5] = digit;
    for (size_t i = 0; i < sizeof(part) / sizeof(part[0]); i++) {
        for (const char *c = part[i]; *c && len < sizeof(line); c++)
            line[len++] = *c;
    }
    ssize_t written = write(STDERR_FILENO, line, len);
    (void)written;
    syscall(SYS_exit_group, SANDBOX_EXIT_CODE); /* not _exit, which sanitizers lengthen */
}

/* ---- making the filters ---- */

static int allow(scmp_filter_ctx ctx, const struct sandbox_rules *rules)
{
    int err = 0;

    for (size_t i = 0; i < rules->count && err == 0; i++) {
        const struct sandbox_rule *r = &rules->rule[i];
        struct scmp_arg_cmp if_arg = {r->arg, SCMP_CMP_MASKED_EQ, r->mask, r->value};
        err = r->mask ? seccomp_rule_add_exact_array(ctx, SCMP_ACT_ALLOW, r->nr, 1, &if_arg)
                      : seccomp_rule_add_exact_array(ctx, SCMP_ACT_ALLOW, r->nr, 0, NULL);
        if (err == -EEXIST)
            err = 0;
    }
    return err;
}

/* Signals: to itself alone, and never a new handler for SIGSYS. */
static int allow_signals(scmp_filter_ctx ctx, bool handlers)
{
    const uint64_t all = UINT32_MAX;
    const uint64_t self = (uint32_t)getpid();
    int err = seccomp_rule_add_exact(ctx, SCMP_ACT_ALLOW, SCMP_SYS(tgkill), 1,
                                     SCMP_A0(SCMP_CMP_MASKED_EQ, all, self));

    if (err == 0 && handlers) {
        err = seccomp_rule_add_exact(ctx, SCMP_ACT_ALLOW, SCMP_SYS(kill), 1,
                                     SCMP_A0(SCMP_CMP_MASKED_EQ, all, self));
        /* Numbers that differ from it in a bit: there is no comparison of 32 bits for "not". */
        for (uint32_t bit = 1; bit <= LAST_SIGNAL && err == 0; bit <<= 1)
            err = seccomp_rule_add_exact(ctx, SCMP_ACT_ALLOW, SCMP_SYS(rt_sigaction), 1,
                                         SCMP_A0(SCMP_CMP_MASKED_EQ, bit, ~SIGSYS & bit));
    }
    return err;
}

/* What programs try and know to do without is refused with an error. */
static int refuse(scmp_filter_ctx ctx, const struct sandbox_config *config)
{
    const uint64_t exec = PROT_EXEC;
    /* glibc falls back to clone, whose flags are no pointer. */
    int err = seccomp_rule_add_exact(ctx, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0);

    if (err == 0)
        err = seccomp_rule_add_exact(ctx, SCMP_ACT_ERRNO(EACCES), SCMP_SYS(mmap), 1,
                                     SCMP_A2(SCMP_CMP_MASKED_EQ, exec, exec));
    if (err == 0)
        err = seccomp_rule_add_exact(ctx, SCMP_ACT_ERRNO(EACCES), SCMP_SYS(mprotect), 1,
                                     SCMP_A2(SCMP_CMP_MASKED_EQ, exec, exec));
    if (err == 0)
        err = seccomp_rule_add_exact(
            ctx, config->flags & SANDBOX_NO_NEW_IO_URING ? SCMP_ACT_ERRNO(EPERM) : SCMP_ACT_ALLOW,
            SCMP_SYS(io_uring_setup), 0);
    return err;
}

static int fill(scmp_filter_ctx ctx, enum sandbox_class class, const struct sandbox_config *config)
{
    const uint64_t writes = O_ACCMODE | O_CREAT | O_TRUNC;
    const uint64_t all = UINT32_MAX;
    int err = seccomp_attr_set(ctx, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS);

    if (err == 0) /* a binary tree over the numbers */
        err = seccomp_attr_set(ctx, SCMP_FLTATR_CTL_OPTIMIZE, 2);
    if (err == 0)
        err = allow(ctx, &rules_of_all);
    for (int c = 0; c < SANDBOX_CLASSES && err == 0; c++) {
        if (c == (int)class || class == SANDBOX_CONTROL)
            err = allow(ctx, &rules_of_class[c]);
    }
    if (err == 0)
        err = allow_signals(ctx, class == SANDBOX_CONTROL);
    if (err == 0 && class != SANDBOX_CONTROL) /* malloc looks into /proc and /sys at times */
        err = seccomp_rule_add_exact(ctx, SCMP_ACT_ERRNO(EACCES), SCMP_SYS(openat), 1,
                                     SCMP_A2(SCMP_CMP_MASKED_EQ, writes, 0));
    if (err == 0 && class == SANDBOX_IOTHREAD)
        err = seccomp_rule_add_exact(ctx, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0);
    if (err == 0 && class == SANDBOX_CONTROL)
        err = refuse(ctx, config);
    for (uint32_t i = 0; i < config->num_families && err == 0 && class == SANDBOX_CONTROL; i++)
        err = seccomp_rule_add_exact(ctx, SCMP_ACT_ALLOW, SCMP_SYS(socket), 1,
                                     SCMP_A0(SCMP_CMP_MASKED_EQ, all, (uint32_t)config->family[i]));
    return err;
}

static int export(scmp_filter_ctx ctx, struct sock_fprog *out)
{
    struct stat st;
    int fd = memfd_create("vdev-seccomp", MFD_CLOEXEC);

    if (fd < 0)
        return -errno;
    int err = seccomp_export_bpf(ctx, fd);
    if (err == 0 && fstat(fd, &st) < 0)
        err = -errno;
    if (err == 0) {
        out->filter = malloc((size_t)st.st_size);
        out->len = (unsigned short)((size_t)st.st_size / sizeof(struct sock_filter));
        if (!out->filter || out->len > BPF_MAXINSNS)
            err = -ENOMEM;
        else if (pread(fd, out->filter, (size_t)st.st_size, 0) != st.st_size)
            err = -EIO;
    }
    close(fd);
    return err;
}

static int make(enum sandbox_class class, const struct sandbox_config *config)
{
    scmp_filter_ctx ctx = seccomp_init(SCMP_ACT_TRAP);

    if (!ctx)
        return -ENOSYS;
    int err = fill(ctx, class, config);
    if (err == 0)
        err = export(ctx, &program[class]);
    seccomp_release(ctx);
    return err;
}

int sandbox_seal(const struct sandbox_config *config)
{
    struct sigaction sa = {.sa_sigaction = on_sigsys, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    int err = 0;

    if (sandbox_is_sealed())
        return -EALREADY;
    if (config->num_families > SANDBOX_FAMILIES_MAX)
        return -EINVAL;
    for (int class = 0; class < SANDBOX_CLASSES && err == 0; class++)
        err = make((enum sandbox_class)class, config);
    if (err == 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        err = -errno;
    sigfillset(&sa.sa_mask);
    if (err == 0 && sigaction(SIGSYS, &sa, NULL) < 0)
        err = -errno;
    if (err < 0) {
        for (int class = 0; class < SANDBOX_CLASSES; class++) {
            free(program[class].filter);
            program[class] = (struct sock_fprog){0};
        }
        return err;
    }
    for (int nr = 0; nr < CALLS; nr++)
        call_name[nr] = seccomp_syscall_resolve_num_arch(SCMP_ARCH_NATIVE, nr);
    atomic_store(&sealed, true);
    return 0;
}

bool sandbox_is_sealed(void)
{
    return atomic_load_explicit(&sealed, memory_order_acquire);
}

int sandbox_enter(enum sandbox_class thread_class)
{
    sigset_t sigsys;

    if (!sandbox_is_sealed())
        return 0;
    if ((unsigned)thread_class >= SANDBOX_CLASSES)
        return -EINVAL;
    sigemptyset(&sigsys);
    sigaddset(&sigsys, SIGSYS);
    pthread_sigmask(SIG_UNBLOCK, &sigsys, NULL);
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program[thread_class]) < 0)
        return -errno;
    entered = thread_class;
    return 0;
}
