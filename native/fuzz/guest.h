/*
 * A guest made of the fuzzer's bytes, and the iothread that serves one of its queues.
 *
 * An input is a struct setup, then the guest's memory from address 0 on; what is missing is zero.
 * There the ring lies where `place` says.  One thread plays all parts in turn: the device serves
 * the queue once, the guest writes a word somewhere, and so on for as many turns as the input asks.
 * Workers are real threads, and are waited for.
 */
#ifndef FUZZ_GUEST_H
#define FUZZ_GUEST_H

#include "../tests/harness.h"
#include "iothread.h"
#include "iotlb.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    MEMORY = 0x4000,
    TURNS_MAX = 8,
    RING_MAX = 128,
    /* Where the ring lies, at its largest; the rest is the guest's to use. */
    AT_DESC = 0,
    AT_AVAIL = 0x800,
    AT_USED = 0xa00,
    /* And behind an IOMMU the IOVA of all that: the descriptors begin in one page and end in
       another. */
    AT_IOVA = 0xc00,
};

struct setup {
    uint8_t size;  /* of the ring: its binary logarithm, modulo 8; packed: itself, less 1 */
    uint8_t flags; /* FLAG_... */
    uint16_t next_index;
    uint8_t queue;
    uint8_t turns;  /* modulo TURNS_MAX + 1 */
    uint8_t split;  /* page at which a second region begins, modulo the pages: 0 for none */
    uint8_t device; /* as the device likes */
    struct {
        uint16_t at; /* in words */
        uint16_t value;
    } write[TURNS_MAX];
};

enum {
    FLAG_EVENT_IDX = 1,
    FLAG_INDIRECT = 2,
    FLAG_LOG = 4,
    FLAG_PACKED = 8,
    FLAG_HALF = 16,
    FLAG_IN_ORDER = 32,
    FLAG_VIEW = 64 /* behind an IOMMU; a write may be a change of what that shows (iotlb.h) */
};

struct guest {
    int fd;
    char *host;
    struct vhost_iothread thread;
    struct vhost_device *device;
    struct vhost_queue *queue;
    struct vhost_memory *memory;
    struct iotlb iotlb;
    struct vhost_inflight *inflight; /* NULL: nobody notes what is in flight */
    bool idle;                       /* at the end nothing was left to be popped again */
    struct setup setup;
};

static inline void guest_open(struct guest *g)
{
    struct vhost_iothread *t = &g->thread;

    if (g->fd)
        return;
    running_test = "an input";
    g->fd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(g->fd > 0);
    CHECK_EQ(ftruncate(g->fd, MEMORY), 0);
    g->host = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, g->fd, 0);
    CHECK(g->host != MAP_FAILED);
    CHECK_EQ(vhost_events_new(&t->events), 0);
    pthread_mutex_init(&t->lock, NULL);
    t->message_tail = &t->message;
    t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    t->epoll_fd = -1;
}

static inline struct vhost_memory *guest_memory(const struct guest *g)
{
    uint64_t first = (uint64_t)(g->setup.split % (MEMORY / 4096)) * 4096;
    struct vhost_region *region[2];
    struct vhost_memory *memory;
    uint32_t n = 0;

    if (first)
        CHECK_EQ(vhost_region_map(g->fd, 0, 0, first, &region[n++]), 0);
    CHECK_EQ(vhost_region_map(g->fd, first, first, MEMORY - first, &region[n++]), 0);
    CHECK_EQ(vhost_memory_new(region, n, &memory), 0);
    for (uint32_t i = 0; i < n; i++)
        vhost_region_unref(region[i]);
    return memory;
}

static inline void await_workers(struct guest *g)
{
    while (g->queue->in_flight) {
        struct pollfd p = {.fd = g->thread.wake_fd, .events = POLLIN};
        eventfd_t n;
        CHECK_EQ(poll(&p, 1, 20000), 1);
        eventfd_read(g->thread.wake_fd, &n);
        iothread_take_mail(&g->thread);
    }
}

static inline void one_turn(struct guest *g)
{
    struct vhost_queue *q = g->queue;

    if (queue_may_pop(q))
        q->ops->service(q);
    /* A queue may keep what it only looked at; it gives that back when it is asked to. */
    if (q->ops->quiesce)
        q->ops->quiesce(q);
    await_workers(g);
    iothread_publish(&g->thread);
    if (!q->broken) {
        ring_disarm(q);
        ring_arm(q);
    }
}

/* The front-end gives the queue another view, by a message as ever. */
static inline void change_view(struct guest *g, uint16_t at, uint16_t value)
{
    unsigned kind = at >> 13 & 3;
    struct vhost_queue *q = g->queue;
    struct vhost_memory *view;

    if (kind == IOTLB_MADE_UP) {
        view = iotlb_made_up(&g->iotlb, g->memory, g->host + MEMORY / 2);
        if (!view)
            return;
    } else {
        iotlb_change(&g->iotlb, at, value, MEMORY / IOVA_PAGE);
        view = iotlb_view(&g->iotlb, g->memory);
    }
    atomic_store(&q->home, &g->thread);
    if (kind == IOTLB_MORE)
        CHECK_EQ(vhost_queue_extend_memory(q, view, 0), 0);
    else
        CHECK_EQ(vhost_queue_set_memory(q, view, 0), 0);
    vhost_memory_unref(view);
    iothread_take_mail(&g->thread);
    /* What an earlier server had popped is popped first. */
    for (int pass = 0; atomic_load(&q->unanswered); pass++) {
        CHECK(pass <= RING_MAX);
        one_turn(g);
        queue_settle(q);
    }
    atomic_store(&q->home, NULL);
}

static inline void guest_acts(struct guest *g, uint16_t at, uint16_t value)
{
    if (g->setup.flags & FLAG_VIEW && at >> 13 & 3)
        change_view(g, at, value);
    else
        ((uint16_t *)g->host)[at % (MEMORY / 2)] = value;
}

/* Any place in a packed ring, for both indexes or for that of what is available. */
static inline uint32_t packed_index(const struct setup *setup, uint32_t size)
{
    uint32_t place = (setup->next_index & 0x7fffu) % size | (setup->next_index & 0x8000u);

    return setup->flags & FLAG_HALF ? place : place << 16 | place;
}

/* Serves the queue of `device` to the guest that the input describes.  False: its in-flight region
 * says what cannot be. */
static inline bool guest_run(struct guest *g, const struct setup *setup, const uint8_t *memory,
                             size_t len, uint64_t features, void (*between)(struct guest *, int))
{
    struct vhost_event events[16];

    g->setup = *setup;
    memset(g->host, 0, MEMORY);
    memcpy(g->host, memory, len < MEMORY ? len : MEMORY);
    if (setup->flags & FLAG_EVENT_IDX)
        features |= UINT64_C(1) << VIRTIO_F_EVENT_IDX;
    if (setup->flags & FLAG_INDIRECT)
        features |= UINT64_C(1) << VIRTIO_F_INDIRECT_DESC;
    if (setup->flags & FLAG_IN_ORDER)
        features |= UINT64_C(1) << VIRTIO_F_IN_ORDER;
    struct vhost_queue_config config = {
        .features = features | UINT64_C(1) << VIRTIO_F_VERSION_1,
        .desc = AT_DESC,
        .avail = AT_AVAIL,
        .used = AT_USED,
        .index = setup->queue % g->device->num_queues,
        .size = 1u << setup->size % 8,
        .next_index = setup->next_index,
        .enabled = true,
        .kick_fd = -1,
        .call_fd = -1,
        .err_fd = -1,
        .inflight = g->inflight,
    };
    if (setup->flags & FLAG_PACKED) {
        config.features |= UINT64_C(1) << VIRTIO_F_RING_PACKED;
        config.size = 1u + setup->size % RING_MAX;
        config.next_index = packed_index(setup, config.size);
    }
    g->memory = guest_memory(g);
    struct vhost_memory *seen = g->memory;
    if (setup->flags & FLAG_VIEW) {
        config.desc += AT_IOVA;
        config.avail += AT_IOVA;
        config.used += AT_IOVA;
        iotlb_open(&g->iotlb, setup->device >> 4, MEMORY / IOVA_PAGE);
        seen = iotlb_view(&g->iotlb, g->memory);
    }
    if (setup->flags & FLAG_LOG) {
        CHECK_EQ(vhost_log_new(MEMORY / VHOST_LOG_PAGE, &config.log), 0);
        config.log_used = AT_USED;
    }
    int err = vhost_queue_new(&config, g->device, seen, &g->queue);
    if (seen != g->memory)
        vhost_memory_unref(seen);
    vhost_log_unref(config.log);
    if (err == -EBADMSG && g->inflight) {
        vhost_memory_unref(g->memory);
        return false;
    }
    CHECK_EQ(err, 0);
    g->queue->thread = &g->thread;
    g->queue->polling = true;
    for (int turn = 0; turn <= setup->turns % (TURNS_MAX + 1); turn++) {
        if (turn)
            guest_acts(g, setup->write[turn - 1].at, setup->write[turn - 1].value);
        if (between)
            between(g, turn);
        one_turn(g);
    }
    if (g->queue->ops->detach)
        g->queue->ops->detach(g->queue);
    CHECK_EQ(g->queue->in_flight, 0);
    g->idle = !queue_resumes(g->queue);
    CHECK_EQ(vhost_queue_free(g->queue), 0);
    vhost_memory_unref(g->memory);
    while (vhost_events_read(g->thread.events, events, ARRAY_SIZE(events)) > 0)
        ;
    return true;
}

/* An input's two parts; false: it is too short. */
static inline int guest_take(const uint8_t **data, size_t *len, struct setup *setup)
{
    if (*len < sizeof(*setup))
        return 0;
    memcpy(setup, *data, sizeof(*setup));
    *data += sizeof(*setup);
    *len -= sizeof(*setup);
    return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

#endif
