/*
 * The sandbox: what each class may do, and that what it may not ends the process, by name.
 * Each case is a child, since nothing of a sandbox can be taken back.
 */
#include "forbidden.h"
#include "harness.h"
#include "libsandbox.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *const class_name[SANDBOX_CLASSES] = {"control", "iothread", "vcpu"};
static const struct sandbox_config unix_only = {.num_families = 1, .family = {AF_UNIX}};

enum { LIVED = 7 };

struct end {
    int status;
    char said[512];
};

/* Runs `act` in a child of this class; it ends with what `act` returns, else as it was ended. */
static struct end in_class(enum sandbox_class class, const struct sandbox_config *config,
                           int (*act)(void))
{
    struct end e = {0};
    int out[2];

    CHECK_EQ(pipe(out), 0);
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        dup2(out[1], STDERR_FILENO);
        if (config && sandbox_seal(config) != 0)
            _exit(100);
        if (sandbox_enter(class) != 0)
            _exit(101);
        _exit(act());
    }
    close(out[1]);
    size_t len = 0;
    ssize_t n;
    while ((n = read(out[0], e.said + len, sizeof(e.said) - 1 - len)) > 0)
        len += (size_t)n;
    close(out[0]);
    CHECK_EQ(waitpid(pid, &e.status, 0), pid);
    return e;
}

static void check_lives(enum sandbox_class class, const struct sandbox_config *config,
                        int (*act)(void))
{
    struct end e = in_class(class, config, act);

    if (!WIFEXITED(e.status) || WEXITSTATUS(e.status) != LIVED)
        printf("# %s: %s", class_name[class], e.said);
    CHECK(WIFEXITED(e.status));
    CHECK_EQ(WEXITSTATUS(e.status), LIVED);
}

static void check_ends(enum sandbox_class class, int (*act)(void), const char *call)
{
    struct end e = in_class(class, &unix_only, act);
    char want[128];

    snprintf(want, sizeof(want), "forbidden system call %s ", call);
    if (!WIFEXITED(e.status) || !strstr(e.said, want) || !strstr(e.said, class_name[class]))
        printf("# %s in %s: status %x, said %s\n", call, class_name[class], e.status, e.said);
    CHECK(WIFEXITED(e.status));
    CHECK_EQ(WEXITSTATUS(e.status), SANDBOX_EXIT_CODE);
    CHECK(strstr(e.said, want) != NULL);
    CHECK(strstr(e.said, class_name[class]) != NULL);
}

/* ---- what must be refused ---- */

static void a_forbidden_call_ends_the_process_by_name(void)
{
    for (size_t i = 0; i < sizeof(forbidden) / sizeof(forbidden[0]); i++) {
        for (int class = 0; class < SANDBOX_CLASSES; class++)
            check_ends((enum sandbox_class)class, forbidden[i].act, forbidden[i].call);
    }
    check_ends(SANDBOX_CONTROL, do_kill_parent, "kill");
}

/* ---- what the narrower classes lack ---- */

static int do_open(void)
{
    return open("/dev/null", O_RDONLY) < 0 ? 1 : LIVED;
}

static int do_open_refused(void)
{
    return open("/proc/sys/vm/overcommit_memory", O_RDONLY | O_CLOEXEC) < 0 && errno == EACCES
               ? LIVED
               : 1;
}

static int do_open_to_write(void)
{
    return open("/dev/null", O_WRONLY) < 0 ? 1 : LIVED;
}

static int do_socket_unix(void)
{
    return socket(AF_UNIX, SOCK_STREAM, 0) < 0 ? 1 : LIVED;
}

static int do_uring(void)
{
    uint64_t params[15] = {0};
    long fd = syscall(SYS_io_uring_setup, 4, params);

    /* A host may refuse it, but not as a crime. */
    return fd >= 0 || errno == EPERM || errno == ENOSYS ? LIVED : 1;
}

static int do_uring_refused(void)
{
    uint64_t params[15] = {0};

    return syscall(SYS_io_uring_setup, 4, params) == -1 && errno == EPERM ? LIVED : 1;
}

static int do_epoll(void)
{
    struct epoll_event e;

    return epoll_wait(-1, &e, 1, 0) < 0 && errno == EBADF ? LIVED : 1;
}

static int do_kvm_run(void)
{
    return ioctl(-1, KVM_RUN, 0) < 0 && errno == EBADF ? LIVED : 1;
}

static int do_kvm_memory(void)
{
    return ioctl(-1, KVM_SET_USER_MEMORY_REGION, NULL) < 0 && errno == EBADF ? LIVED : 1;
}

static void narrow_classes_lack_what_they_do_not_need(void)
{
    check_lives(SANDBOX_CONTROL, &unix_only, do_open);
    check_lives(SANDBOX_CONTROL, &unix_only, do_open_to_write);
    check_lives(SANDBOX_IOTHREAD, &unix_only, do_open_refused);
    check_ends(SANDBOX_IOTHREAD, do_open_to_write, "openat");
    check_lives(SANDBOX_VCPU, &unix_only, do_open_refused);
    check_ends(SANDBOX_VCPU, do_open_to_write, "openat");
    check_lives(SANDBOX_CONTROL, &unix_only, do_socket_unix);
    check_ends(SANDBOX_IOTHREAD, do_socket_unix, "socket");
    check_ends(SANDBOX_VCPU, do_socket_unix, "socket");
    check_lives(SANDBOX_CONTROL, &unix_only, do_uring);
    check_ends(SANDBOX_IOTHREAD, do_uring, "io_uring_setup");
    check_ends(SANDBOX_VCPU, do_uring, "io_uring_setup");
    check_lives(SANDBOX_CONTROL, &unix_only, do_epoll);
    check_lives(SANDBOX_IOTHREAD, &unix_only, do_epoll);
    check_ends(SANDBOX_VCPU, do_epoll, "epoll_wait");
    check_lives(SANDBOX_CONTROL, &unix_only, do_kvm_run);
    check_ends(SANDBOX_IOTHREAD, do_kvm_run, "ioctl");
    check_lives(SANDBOX_VCPU, &unix_only, do_kvm_run);
    check_lives(SANDBOX_CONTROL, &unix_only, do_kvm_memory);
    check_ends(SANDBOX_VCPU, do_kvm_memory, "ioctl");
}

static void new_rings_may_be_refused_with_an_error(void)
{
    struct sandbox_config c = unix_only;

    c.flags = SANDBOX_NO_NEW_IO_URING;
    check_lives(SANDBOX_CONTROL, &c, do_uring_refused);
}

/* ---- what each class needs ---- */

static int memory_and_events(void)
{
    eventfd_t value;
    char *small = malloc(100), *large = malloc(1 << 24);
    int fd = dup(STDERR_FILENO);

    (void)fd;
    if (!small || !large)
        return 1;
    memset(large, 1, 1 << 24);
    free(small);
    free(large);
    if (eventfd_read(-1, &value) == 0 || eventfd_write(-1, 1) == 0)
        return 2;
    return LIVED;
}

static int in_a_vcpu(void)
{
    char *large = malloc(1 << 24);

    if (!large)
        return 1;
    memset(large, 1, 1 << 24);
    free(large);
    return eventfd_write(-1, 1) < 0 && errno == EBADF ? LIVED : 2;
}

static int memfd = -1;

static int transfers(void)
{
    char data[4096] = "x";
    struct iovec iov = {data, sizeof(data)};

    if (pwritev2(memfd, &iov, 1, 0, 0) != sizeof(data) ||
        preadv2(memfd, &iov, 1, 0, 0) != sizeof(data) || fdatasync(memfd) < 0 ||
        fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) < 0)
        return 1;
    return LIVED;
}

static void *nothing(void *arg)
{
    return arg;
}

static int starts_a_thread(void)
{
    pthread_t thread;

    if (pthread_create(&thread, NULL, nothing, NULL) != 0)
        return 1;
    return pthread_join(thread, NULL) == 0 ? LIVED : 2;
}

static void *iothread_that_starts_one(void *arg)
{
    (void)arg;
    return sandbox_enter(SANDBOX_IOTHREAD) == 0 && starts_a_thread() == LIVED ? &memfd : NULL;
}

static int starts_an_iothread_that_starts_one(void)
{
    pthread_t thread;
    void *result = NULL;

    if (pthread_create(&thread, NULL, iothread_that_starts_one, NULL) != 0)
        return 1;
    return pthread_join(thread, &result) == 0 && result ? LIVED : 2;
}

static int no_executable_memory(void)
{
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED || mprotect(p, 4096, PROT_READ | PROT_EXEC) == 0 || errno != EACCES)
        return 1;
    p = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED && errno == EACCES ? LIVED : 2;
}

static int signals_itself(void)
{
    signal(SIGUSR1, SIG_IGN);
    return kill(getpid(), SIGUSR1) == 0 && raise(SIGUSR1) == 0 ? LIVED : 1;
}

static void a_class_can_do_its_work(void)
{
    memfd = memfd_create("test", 0);
    CHECK(memfd >= 0);
    check_lives(SANDBOX_CONTROL, &unix_only, memory_and_events);
    check_lives(SANDBOX_VCPU, &unix_only, in_a_vcpu);
    check_lives(SANDBOX_IOTHREAD, &unix_only, in_a_vcpu);
    check_lives(SANDBOX_IOTHREAD, &unix_only, transfers);
    check_lives(SANDBOX_CONTROL, &unix_only, transfers);
    check_lives(SANDBOX_CONTROL, &unix_only, starts_an_iothread_that_starts_one);
    check_lives(SANDBOX_CONTROL, &unix_only, starts_a_thread);
    check_lives(SANDBOX_CONTROL, &unix_only, no_executable_memory);
    check_lives(SANDBOX_CONTROL, &unix_only, signals_itself);
    close(memfd);
}

static void nothing_is_refused_before_the_seal(void)
{
    check_lives(SANDBOX_VCPU, NULL, do_open);
}

/* ---- tricks ---- */

static void *vcpu_that_opens(void *arg)
{
    if (sandbox_enter(SANDBOX_VCPU) == 0)
        do_open_to_write();
    return arg;
}

static int starts_a_vcpu_that_opens(void)
{
    sigset_t all;
    pthread_t thread;

    sigfillset(&all); /* as native threads are started */
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    if (pthread_create(&thread, NULL, vcpu_that_opens, NULL) != 0)
        return 1;
    pthread_join(thread, NULL);
    return LIVED;
}

static void a_thread_takes_the_whole_process_with_it(void)
{
    struct end e = in_class(SANDBOX_CONTROL, &unix_only, starts_a_vcpu_that_opens);

    CHECK(WIFEXITED(e.status));
    CHECK_EQ(WEXITSTATUS(e.status), SANDBOX_EXIT_CODE);
    CHECK(strstr(e.said, "openat") && strstr(e.said, "vcpu"));
}

static int hides_the_signal(void)
{
    sigset_t all;

    sigfillset(&all);
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, NULL, 8);
    do_execve();
    return LIVED;
}

static int calls_as_x32(void)
{
    syscall(0x40000000 | SYS_getpid);
    return LIVED;
}

static void the_kernel_ends_what_evades_the_handler(void)
{
    struct end e = in_class(SANDBOX_VCPU, &unix_only, hides_the_signal);

    CHECK(WIFSIGNALED(e.status));
    CHECK_EQ(WTERMSIG(e.status), SIGSYS);
    e = in_class(SANDBOX_CONTROL, &unix_only, calls_as_x32);
    CHECK(WIFSIGNALED(e.status));
    CHECK_EQ(WTERMSIG(e.status), SIGSYS);
}

static int narrows_down(void)
{
    return sandbox_enter(SANDBOX_VCPU) == 0 ? do_kvm_run() : 1;
}

static int cannot_widen(void)
{
    sandbox_enter(SANDBOX_CONTROL);
    do_open_to_write();
    return LIVED;
}

static void a_class_narrows_and_never_widens(void)
{
    check_lives(SANDBOX_CONTROL, &unix_only, narrows_down);
    struct end e = in_class(SANDBOX_VCPU, &unix_only, cannot_widen);
    CHECK(WIFEXITED(e.status));
    CHECK_EQ(WEXITSTATUS(e.status), SANDBOX_EXIT_CODE);
}

static int seals_again(void)
{
    struct sandbox_config c = unix_only;

    if (sandbox_seal(&c) != -EALREADY || sandbox_enter(SANDBOX_CLASSES) != -EINVAL)
        return 1;
    return LIVED;
}

static int seals_wrongly(void)
{
    struct sandbox_config c = {.num_families = SANDBOX_FAMILIES_MAX + 1};

    return sandbox_seal(&c) == -EINVAL && !sandbox_is_sealed() ? LIVED : 1;
}

static void it_is_sealed_once(void)
{
    check_lives(SANDBOX_CONTROL, &unix_only, seals_again);
    check_lives(SANDBOX_CONTROL, NULL, seals_wrongly);
}

static const struct test tests[] = {
    TEST(a_forbidden_call_ends_the_process_by_name),
    TEST(narrow_classes_lack_what_they_do_not_need),
    TEST(new_rings_may_be_refused_with_an_error),
    TEST(a_class_can_do_its_work),
    TEST(nothing_is_refused_before_the_seal),
    TEST(a_thread_takes_the_whole_process_with_it),
    TEST(the_kernel_ends_what_evades_the_handler),
    TEST(a_class_narrows_and_never_widens),
    TEST(it_is_sealed_once),
};

MAIN(tests)
