/*
 * The life of an iothread, and its mail.
 *
 * Mail is all that crosses from other threads: control messages and what workers have completed.
 * It has a lock, which is why it is looked at only once a pass, and only if the flag is up.
 */
#include "iothread.h"
#include "libsandbox.h"
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { URING_ENTRIES = 256 };

/* ---- mail from other threads ---- */

static void wake(struct vhost_iothread *t)
{
    if (!atomic_exchange(&t->mail, true))
        eventfd_write(t->wake_fd, 1);
}

int iothread_post(struct vhost_iothread *t, struct queue_message *m)
{
    /* Counted here, by the control thread, so that a free right after a start sees it. */
    if (m->op == QUEUE_START)
        atomic_fetch_add(&t->num_queues, 1);
    m->next = NULL;
    pthread_mutex_lock(&t->lock);
    *t->message_tail = m;
    t->message_tail = &m->next;
    pthread_mutex_unlock(&t->lock);
    wake(t);
    return 0;
}

void iothread_complete(struct vhost_iothread *t, struct io_op *op, int32_t result)
{
    op->result = result;
    pthread_mutex_lock(&t->lock);
    op->next = t->completed;
    t->completed = op;
    /* Under the lock: once the iothread has the op, nothing keeps it from being freed. */
    wake(t);
    pthread_mutex_unlock(&t->lock);
}

void iothread_take_mail(struct vhost_iothread *t)
{
    atomic_store(&t->mail, false);
    pthread_mutex_lock(&t->lock);
    struct queue_message *m = t->message;
    struct io_op *op = t->completed;
    t->message = NULL;
    t->message_tail = &t->message;
    t->completed = NULL;
    pthread_mutex_unlock(&t->lock);

    t->now = now_ns();
    while (op) {
        struct io_op *next = op->next;
        op->done(op, op->result);
        op = next;
    }
    while (m) {
        struct queue_message *next = m->next;
        queue_handle(m);
        m = next;
    }
}

/* ---- life ---- */

/* A ring's requests pass by every seccomp filter, so this one takes none but what blk_io.c makes:
 * no thread can be made to open or connect anything through it (Linux 5.10). */
static int uring_restrict(int fd)
{
    struct io_uring_restriction allowed[] = {
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_READV},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_WRITEV},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_FSYNC},
        {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_ASYNC_CANCEL},
        {.opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED, .sqe_flags = IOSQE_ASYNC},
    };
    size_t count = sizeof(allowed) / sizeof(allowed[0]);

    /* By number: liburing 2.3 declares these two, but does not export them. */
    if (syscall(SYS_io_uring_register, fd, IORING_REGISTER_RESTRICTIONS, allowed, count) < 0 ||
        syscall(SYS_io_uring_register, fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0)
        return -errno;
    return 0;
}

static int uring_open(struct vhost_iothread *t)
{
    if (t->config.flags & VHOST_IOTHREAD_NO_IO_URING)
        return 0;
    /* One submitter, and completions taken when we enter the kernel anyway (Linux 6.0, 5.19). */
    unsigned flags = IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER |
                     IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    int err = io_uring_queue_init(URING_ENTRIES, &t->uring, flags);
    if (err == -EINVAL)
        err = io_uring_queue_init(URING_ENTRIES, &t->uring, IORING_SETUP_R_DISABLED);
    if (err < 0)
        return 0; /* refused: the devices use their worker pools */
    if (uring_restrict(t->uring.ring_fd) < 0) {
        io_uring_queue_exit(&t->uring);
        return 0;
    }
    t->has_uring = true;
    return iothread_epoll_add(t, t->uring.ring_fd, EPOLLIN, NULL, TAG_URING);
}

static void *run(void *arg)
{
    struct vhost_iothread *t = arg;

    pthread_setname_np(pthread_self(), "vdev-io");
    t->tid = (pid_t)syscall(SYS_gettid);
    if (t->config.cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(t->config.cpu, &set);
        if (sched_setaffinity(0, sizeof(set), &set) < 0)
            t->error = -errno;
    }
    if (!t->error)
        t->error = uring_open(t);
    if (!t->error) /* its ring is there: it makes no other */
        t->error = sandbox_enter(SANDBOX_IOTHREAD);
    bool run_loop = !t->error;
    sem_post(&t->ready);
    if (run_loop)
        iothread_loop(t);
    if (t->has_uring)
        io_uring_queue_exit(&t->uring);
    return NULL;
}

static void destroy(struct vhost_iothread *t)
{
    close(t->epoll_fd);
    close(t->wake_fd);
    sem_destroy(&t->ready);
    pthread_mutex_destroy(&t->lock);
    free(t->polling);
    free(t);
}

int vhost_iothread_new(const struct vhost_iothread_config *config, struct vhost_events *events,
                       struct vhost_iothread **out)
{
    struct vhost_iothread *t = calloc(1, sizeof(*t));
    sigset_t all, before;

    if (!t)
        return -ENOMEM;
    t->config = *config;
    t->events = events;
    t->message_tail = &t->message;
    t->poll_max_ns = (uint64_t)config->poll_max_us * 1000;
    t->poll_ns = t->poll_max_ns;
    pthread_mutex_init(&t->lock, NULL);
    sem_init(&t->ready, 0, 0);
    t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->epoll_fd < 0 || t->wake_fd < 0) {
        int err = -errno;
        destroy(t);
        return err;
    }
    int err = iothread_epoll_add(t, t->wake_fd, EPOLLIN | EPOLLET, NULL, TAG_WAKE);
    /* Signals are the main thread's; SIGBUS is ours, it is raised by our own touch. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (err == 0)
        err = -pthread_create(&t->thread, NULL, run, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err < 0) {
        destroy(t);
        return err;
    }
    while (sem_wait(&t->ready) < 0)
        ;
    if (t->error) {
        err = t->error;
        pthread_join(t->thread, NULL);
        destroy(t);
        return err;
    }
    *out = t;
    return 0;
}

int vhost_iothread_free(struct vhost_iothread *t)
{
    if (!t)
        return 0;
    if (atomic_load(&t->num_queues) > 0)
        return -EBUSY;
    atomic_store(&t->stop, true);
    eventfd_write(t->wake_fd, 1);
    pthread_join(t->thread, NULL);
    destroy(t);
    return 0;
}

bool vhost_iothread_has_io_uring(const struct vhost_iothread *t)
{
    return t->has_uring;
}

int vhost_iothread_tid(const struct vhost_iothread *t)
{
    return t->tid;
}

void vhost_iothread_read_stats(const struct vhost_iothread *t, struct vhost_iothread_stats *out)
{
    out->wakeups = __atomic_load_n(&t->stats.wakeups, __ATOMIC_RELAXED);
    out->poll_ns = __atomic_load_n(&t->stats.poll_ns, __ATOMIC_RELAXED);
}
