/*
 * Runs so many requests of one scenario through the library's own code, to have them counted.
 *
 *   ring_cost SCENARIO-BATCH REQUESTS     says nothing, unless something went wrong
 *   ring_cost --list                      names the scenarios
 *
 * perf/instructions.py runs this under callgrind, which counts what happens in counted() but not
 * what happens, inside that, in uncounted(): these two names are the interface.  The guest's and
 * the network's turns are not counted, so nearly all that is counted is the library's.
 *
 * Nothing depends on the machine or on the moment.  One thread plays all parts in turn: the guest
 * makes a batch available, the iothread serves its queue and publishes.  The clock and io_uring
 * are played as well; other system calls are real, and cost nothing in this count.
 */
#include "scenarios.h"
#include <sys/epoll.h>

/* A function that remains one of its own, under its own name. */
#if __has_attribute(noipa)
#define NAMED __attribute__((noipa))
#else
#define NAMED __attribute__((noinline))
#endif

static const uint32_t batches[] = {1, BATCH_MAX};

/* ---- the kernel's part ---- */

/* Instead of libc's: each reading is a microsecond later than the one before. */
int clock_gettime(clockid_t id, struct timespec *ts)
{
    static struct timespec now = {.tv_sec = 1};

    (void)id;
    now.tv_nsec += 1000;
    if (now.tv_nsec == 1000000000)
        now = (struct timespec){.tv_sec = now.tv_sec + 1};
    *ts = now;
    return 0;
}

static void uring_open(struct io_uring *ring)
{
    static unsigned sq_head, sq_tail, sq_flags, cq_head, cq_tail;
    static struct io_uring_sqe sqes[RING_SIZE];

    ring->sq.khead = &sq_head;
    ring->sq.ktail = &sq_tail;
    ring->sq.kflags = &sq_flags;
    ring->sq.sqes = sqes;
    ring->sq.ring_entries = RING_SIZE;
    ring->sq.ring_mask = RING_SIZE - 1;
    ring->cq.khead = &cq_head;
    ring->cq.ktail = &cq_tail;
}

/* All that was prepared has been done; the iothread learns of it as from a completion. */
static void uring_complete(struct io_uring *ring)
{
    struct io_uring_sq *sq = &ring->sq;

    for (; *sq->khead != sq->sqe_tail; ++*sq->khead) {
        const struct io_uring_sqe *sqe = &sq->sqes[*sq->khead & sq->ring_mask];
        const struct iovec *iov = (const struct iovec *)(uintptr_t)sqe->addr;
        struct io_op *op = (struct io_op *)(uintptr_t)sqe->user_data;
        op->done(op, (int32_t)iov->iov_len);
    }
}

/* ---- turns ---- */

/* The guest has what it asked for, and makes the next batch.  False: that was all. */
NAMED static bool uncounted(struct bench *b)
{
    uint32_t batch = b->left < b->batch ? (uint32_t)b->left : b->batch;

    CHECK_EQ(driver_used_idx(&b->ring), b->asked);
    if (b->scenario->before)
        b->scenario->before(b, batch);
    while (b->ring.seen != b->asked)
        driver_take(&b->ring);
    if (b->ring.features & EVENT_IDX)
        driver_want_call_after(&b->ring, 0);
    offer(b, batch);
    driver_publish(&b->ring);
    b->asked += (uint16_t)batch;
    b->left -= batch;
    return batch > 0;
}

/* In the iothread's own loop the guest is a queue that is served before the other. */
static bool guest_service(struct vhost_queue *q)
{
    struct bench *b = q->state;

    if (!uncounted(b))
        atomic_store(&b->thread.stop, true);
    return false;
}

NAMED static void counted(struct bench *b)
{
    if (b->scenario->loop) {
        iothread_loop(&b->thread);
        return;
    }
    while (uncounted(b)) {
        b->queue->ops->service(b->queue);
        uring_complete(&b->thread.uring);
        iothread_publish(&b->thread);
    }
}

static struct vhost_inflight *inflight_new(bool packed)
{
    struct vhost_inflight *region;
    int fd = memfd_create("inflight", MFD_CLOEXEC);

    CHECK_EQ(ftruncate(fd, (off_t)vhost_inflight_size(1, RING_SIZE, packed)), 0);
    CHECK_EQ(vhost_inflight_map(fd, 0, 1, RING_SIZE, packed, &region), 0);
    return region;
}

static void run(const struct scenario *s, uint32_t batch, uint64_t requests)
{
    static const struct device_ops guest_ops = {.service = guest_service};
    struct bench b = {.scenario = s, .batch = batch, .left = requests};
    struct vhost_queue guest = {.ops = &guest_ops, .state = &b};

    b.guest = guest_new(4 * GUEST_SIZE, 0);
    b.ring = driver_new(&b.guest, 0, RING_SIZE, VERSION_1 | s->features, 0);
    if (b.ring.packed)
        b.ring.packed->in_order = s->features & IN_ORDER;
    s->open(&b);
    struct vhost_queue_config config = driver_config(&b.ring, s->queue);
    if (s->tracked)
        config.inflight = inflight_new(s->features & PACKED);
    if (s->logged) {
        CHECK_EQ(vhost_log_new((GUEST_BASE + 4 * GUEST_SIZE) / VHOST_LOG_PAGE, &config.log), 0);
        config.log_used = config.used;
    }
    CHECK_EQ(vhost_queue_new(&config, b.device, b.guest.memory, &b.queue), 0);
    offer(&b, s->ahead);

    uring_open(&b.thread.uring);
    b.thread.has_uring = true;
    b.thread.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    b.thread.config.flags = VHOST_IOTHREAD_POLL_ALWAYS;
    b.thread.queues = b.queue;
    b.thread.polling = (struct vhost_queue *[]){&guest, b.queue};
    b.thread.num_polling = 2;
    b.queue->thread = &b.thread;
    b.queue->polling = true;
    counted(&b);
    s->check(&b, requests);
}

/* ---- the command ---- */

static int refuse(const char *what, const char *why)
{
    fprintf(stderr, "ring_cost: %s: %s\n", what, why);
    return 2;
}

int main(int argc, char **argv)
{
    bool list = argc == 2 && strcmp(argv[1], "--list") == 0;
    unsigned long long requests = 0;

    if (!list) {
        if (argc != 3)
            return refuse("usage", "ring_cost SCENARIO-BATCH REQUESTS, or ring_cost --list");
        char *end;
        requests = strtoull(argv[2], &end, 10);
        if (*end || requests == 0 || requests > UINT32_MAX)
            return refuse(argv[2], "no number of requests");
    }
    for (size_t i = 0; i < ARRAY_SIZE(scenarios); i++) {
        for (size_t j = 0; j < ARRAY_SIZE(batches); j++) {
            char name[64];
            snprintf(name, sizeof(name), "%s-%u", scenarios[i].name, batches[j]);
            if (list) {
                puts(name);
            } else if (strcmp(name, argv[1]) == 0) {
                running_test = name;
                run(&scenarios[i], batches[j], requests);
                return 0;
            }
        }
    }
    return list ? 0 : refuse(argv[1], "no such scenario, ring_cost --list names them");
}
