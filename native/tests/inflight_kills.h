/*
 * A server that is killed after each of its stores.  A program says by LAYOUT to what rings.
 *
 * The victim is a process that serves its own ring, and is made to do so one instruction at a time.
 * Whenever it has changed what it shares with others, its end is played: its memory is copied, and
 * a real queue goes on from the copy, for a driver that knows what the victim's did.  What that
 * driver was owed must come, in the order in which it asked for it, once, and nothing else.
 *
 * The victim also goes on from what it left itself, so a kill may fall into that as well.
 */
#ifndef INFLIGHT_KILLS_H
#define INFLIGHT_KILLS_H

#include "iothread.h"
#include "rig.h"
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

/* Chains of 3, 1, 2, 1 and 1 descriptors, by their heads: together the whole ring. */
#if defined(__SANITIZE_THREAD__)
enum { ROUNDS = 2 }; /* its instructions are a hundred times as many */
#elif defined(__SANITIZE_ADDRESS__)
enum { ROUNDS = 4 };
#else
enum { ROUNDS = 12 };
#endif
enum { SIZE = 8, CHAINS = 5, MEMORY = 0x11000, REGION_QUEUE = SIZE + 2 };

static const uint16_t head_of[CHAINS] = {0, 3, 4, 6, 7};

/* What the driver knows; in memory that the victim and its observer share. */
struct driver_state {
    struct driver_ring ring;
    struct packed_half packed;
    uint16_t owed[CHAINS]; /* heads that were made available and not given back, in order */
    uint32_t num_owed;
    bool at_work; /* the server is; otherwise it is the driver's turn */
};

struct victim {
    struct driver_state *driver;
    struct guest guest;
    struct vhost_inflight *region;
    int region_fd;
    char *region_host;
    struct vhost_iothread thread;
    struct probe *probe;
    struct vhost_queue *queue;
    uint16_t held[CHAINS]; /* popped and not pushed */
    uint32_t num_held;
    uint64_t random;
};

static uint64_t region_size(void)
{
    return vhost_inflight_size(1, REGION_QUEUE, LAYOUT);
}

static void make_chains(struct driver_ring *d)
{
    for (int i = 0; i < CHAINS; i++) {
        uint16_t head = head_of[i], end = i + 1 < CHAINS ? head_of[i + 1] : SIZE;
        *(char *)buffer_at(d, head) = (char)('A' + head);
        for (uint16_t k = head; k < end; k++)
            set_desc(d->desc, k, buffer_addr(d, k), 1,
                     (k > head ? VRING_DESC_F_WRITE : 0) | (k + 1 < end ? VRING_DESC_F_NEXT : 0),
                     k + 1);
    }
}

/* ---- the driver ---- */

static void settle_with_driver(struct driver_state *s)
{
    while (driver_used_idx(&s->ring) != s->ring.seen) {
        uint32_t id = driver_take(&s->ring).id, kept = 0;
        for (uint32_t i = 0; i < s->num_owed; i++) {
            if (s->owed[i] != id)
                s->owed[kept++] = s->owed[i];
        }
        CHECK_EQ(kept, s->num_owed - 1);
        s->num_owed = kept;
    }
}

static bool is_owed(const struct driver_state *s, uint16_t head)
{
    for (uint32_t i = 0; i < s->num_owed; i++) {
        if (s->owed[i] == head)
            return true;
    }
    return false;
}

/* ---- the victim ---- */

static uint32_t pick(struct victim *v, uint32_t below)
{
    v->random = v->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(v->random >> 33) % below;
}

static void offer_some(struct victim *v)
{
    struct driver_state *s = v->driver;

    settle_with_driver(s);
    for (int tries = 0; tries < CHAINS; tries++) {
        uint16_t head = head_of[pick(v, CHAINS)];
        if (is_owed(s, head))
            continue;
        driver_offer(&s->ring, head);
        s->owed[s->num_owed++] = head;
    }
    driver_publish(&s->ring);
}

static void push_one(struct victim *v)
{
    uint32_t i = pick(v, v->num_held);
    uint16_t head = v->held[i];

    ring_push(v->queue, head, head == 0 ? 2 : 0);
    v->held[i] = v->held[--v->num_held];
}

static void serve_some(struct victim *v)
{
    struct chain c;

    while (ring_pending(v->queue) && ring_pop(v->queue, &c))
        v->held[v->num_held++] = c.head;
    for (uint32_t n = v->num_held ? pick(v, v->num_held + 1) : 0; n; n--) {
        push_one(v);
        if (pick(v, 3) == 0)
            ring_show(v->queue);
    }
    if (v->num_held && pick(v, 4) == 0)
        push_one(v); /* not shown if the next thing is an end */
    else
        iothread_publish(&v->thread);
}

/* What a front-end says that lost a server: the used index, where there is one. */
static struct vhost_queue_config tracked_config(const struct driver_ring *d,
                                                struct vhost_inflight *region)
{
    struct vhost_queue_config config = driver_config(d, 0);

    if (!LAYOUT)
        config.next_index = d->used[1];
    config.kick_fd = config.call_fd = config.err_fd = -1;
    config.inflight = region;
    return config;
}

static void begin_queue(struct victim *v)
{
    struct vhost_queue_config config = tracked_config(&v->driver->ring, v->region);

    CHECK_EQ(vhost_queue_new(&config, &v->probe->device, v->guest.memory, &v->queue), 0);
    v->queue->thread = &v->thread;
}

/* All that it has in flight is lost but for what is noted. */
static void end_queue(struct victim *v)
{
    CHECK_EQ(vhost_queue_free(v->queue), 0);
    v->thread.dirty = NULL;
    v->num_held = 0;
}

/* From here on it is observed; it stops, for the observer to see that. */
static void work(struct victim *v, bool at_work)
{
    v->driver->at_work = at_work;
    if (at_work)
        raise(SIGUSR1);
}

static _Noreturn void live(struct victim *v)
{
    CHECK_EQ(ptrace(PTRACE_TRACEME, 0, NULL, NULL), 0);
    work(v, true);
    begin_queue(v);
    for (int round = 0; round < ROUNDS; round++) {
        work(v, false);
        offer_some(v);
        work(v, true);
        serve_some(v);
        if (pick(v, 3) == 0) {
            end_queue(v);
            begin_queue(v);
        }
    }
    work(v, false);
    _exit(0);
}

/* ---- its end ---- */

/* Pops all that is owed, then completes one after another, the last first: the driver must be shown
 * each, and no other. */
static void repay(struct victim *v)
{
    struct driver_state *s = v->driver;
    struct vhost_queue *q = v->queue;
    uint32_t n = s->num_owed;
    struct chain c;

    for (uint32_t i = 0; i < n; i++) {
        CHECK(ring_pending(q) && ring_pop(q, &c));
        CHECK_EQ(c.head, s->owed[i]);
        CHECK_EQ(*(char *)c.iov[0].iov_base, 'A' + c.head);
    }
    CHECK(!ring_pending(q) && !q->broken);
    while (n--) {
        uint16_t head = s->owed[n];
        ring_push(q, head, 0);
        iothread_publish(q->thread);
        settle_with_driver(s);
        CHECK_EQ(s->num_owed, n);
        CHECK(!is_owed(s, head));
    }
}

/* Whoever comes next, with copies of all that outlives the victim. */
static void play_end(const struct victim *v)
{
    struct victim next = {.guest = guest_new(MEMORY, 0), .probe = v->probe};
    struct driver_state s = *v->driver;
    int fd = memfd_create("inflight", MFD_CLOEXEC);

    next.driver = &s;
    s.ring = driver_new(&next.guest, 0, SIZE, VERSION_1, 0);
    s.ring.avail_idx = v->driver->ring.avail_idx;
    s.ring.seen = v->driver->ring.seen;
    if (LAYOUT) {
        struct packed_half *p = s.ring.packed;
        p->fill = s.packed.fill;
        p->take = s.packed.take;
        memcpy(p->length, s.packed.length, sizeof(p->length));
    }
    memcpy(next.guest.host, v->guest.host, MEMORY);
    make_chains(&s.ring);
    CHECK_EQ(ftruncate(fd, (off_t)region_size()), 0);
    CHECK_EQ(pwrite(fd, v->region_host, region_size(), 0), (ssize_t)region_size());
    CHECK_EQ(vhost_inflight_map(fd, 0, 1, REGION_QUEUE, LAYOUT, &next.region), 0);

    settle_with_driver(&s);
    begin_queue(&next);
    repay(&next);
    for (int round = 0; round < 4; round++) {
        offer_some(&next);
        repay(&next);
    }
    end_queue(&next);
    driver_free(&s.ring);
    guest_free(&next.guest);
    vhost_inflight_unref(next.region);
    close(fd);
}

/* ---- the observer ---- */

static void victim_open(struct victim *v, uint64_t seed, uint16_t next_index)
{
    *v = (struct victim){.random = seed};
    v->driver =
        mmap(NULL, sizeof(*v->driver), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(v->driver != MAP_FAILED);
    v->guest = guest_new(MEMORY, 0);
    v->driver->ring = driver_new(&v->guest, 0, SIZE, VERSION_1, next_index);
    if (LAYOUT) {
        v->driver->packed = *v->driver->ring.packed;
        free(v->driver->ring.packed);
        v->driver->ring.packed = &v->driver->packed;
    }
    make_chains(&v->driver->ring);
    v->region_fd = memfd_create("inflight", MFD_CLOEXEC);
    CHECK_EQ(ftruncate(v->region_fd, (off_t)region_size()), 0);
    v->region_host = mmap(NULL, region_size(), PROT_READ | PROT_WRITE, MAP_SHARED, v->region_fd, 0);
    CHECK(v->region_host != MAP_FAILED);
    CHECK_EQ(vhost_inflight_map(v->region_fd, 0, 1, REGION_QUEUE, LAYOUT, &v->region), 0);
    v->probe = probe_new(1);
}

static void victim_close(struct victim *v)
{
    vhost_device_free(&v->probe->device);
    vhost_inflight_unref(v->region);
    munmap(v->region_host, region_size());
    close(v->region_fd);
    v->driver->ring.packed = NULL; /* it is no allocation here */
    if (LAYOUT)
        free(v->driver->ring.desc);
    driver_free(&v->driver->ring);
    guest_free(&v->guest);
    munmap(v->driver, sizeof(*v->driver));
}

/* Whether the victim's rings or its region have changed since the last time. */
static bool has_changed(const struct victim *v, char *seen)
{
    bool changed = memcmp(seen, v->guest.host, AT_TABLE) ||
                   memcmp(seen + AT_TABLE, v->region_host, region_size());

    memcpy(seen, v->guest.host, AT_TABLE);
    memcpy(seen + AT_TABLE, v->region_host, region_size());
    return changed;
}

/* Returns how many ends there were. */
static uint32_t observe(struct victim *v)
{
    static char seen[AT_TABLE + 4096];
    uint32_t ends = 0;
    int status;
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0)
        live(v);
    memset(seen, 0, sizeof(seen));
    for (;;) {
        CHECK_EQ(waitpid(pid, &status, 0), pid);
        if (!WIFSTOPPED(status))
            break;
        bool at_work = v->driver->at_work;
        if (has_changed(v, seen) && at_work) {
            play_end(v);
            ends++;
        }
        CHECK_EQ(ptrace(at_work ? PTRACE_SINGLESTEP : PTRACE_CONT, pid, NULL, NULL), 0);
    }
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return ends;
}

static void killed_after_each_store(void)
{
    struct victim v;

    victim_open(&v, 1, BEFORE_WRAP(SIZE, 3));
    /* Three stores a chain at the least, and each may be the last. */
    CHECK(observe(&v) > 6 * ROUNDS);
    victim_close(&v);
}

#endif
