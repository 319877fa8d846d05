/*
 * What is asked of which device, and how one sees that it was done.
 *
 * A guest's requests are written once and made again and again: RING_SIZE is a multiple of their
 * number, so the heads come round.
 */
#ifndef SCENARIOS_H
#define SCENARIOS_H

#include "../tests/driver_ring.h"
#include "iothread.h"
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <vhost_switch.h>

enum {
    RING_SIZE = 128,
    BATCH_MAX = 32,
    BLOCK = 4096,
    FRAME = sizeof(struct virtio_net_hdr) + 1514,
    RX_BUFFER = 0x600, /* Linux's first guess */
    /* A request's share of guest memory. */
    SLOT = 0x2000,
    HEADER = 0,
    STATUS = 0x100,
    DATA = 0x1000,
    TABLE = 3 * sizeof(struct vring_desc),
};

/* What Linux negotiates wherever it is offered. */
#define USUAL (EVENT_IDX | INDIRECT)
#define MERGEABLE (UINT64_C(1) << VIRTIO_NET_F_MRG_RXBUF)

struct bench;

struct scenario {
    const char *name;
    uint64_t features;
    uint32_t queue; /* its index */
    uint32_t ahead; /* chains that the guest makes available before the first batch */
    bool loop;      /* passes are the iothread's own */
    bool tracked;   /* what is in flight is noted */
    bool logged;    /* and which pages are written */
    void (*open)(struct bench *b);                     /* makes the device, and its requests */
    void (*before)(struct bench *b, uint32_t batch);   /* the network's turn; may be NULL */
    void (*check)(struct bench *b, uint64_t requests); /* afterwards: all was done as meant */
};

struct bench {
    const struct scenario *scenario;
    struct vhost_iothread thread; /* what the library knows of one: there is no second thread */
    struct guest guest;
    struct driver_ring ring;
    struct vhost_device *device;
    struct vhost_queue *queue;
    uint32_t batch;
    uint64_t left;          /* requests that the guest has still to make */
    uint16_t asked;         /* of the used index: all made so far */
    uint16_t count, stride; /* requests; their heads are multiples of the stride */
    int tap[2];             /* the device's end, the network's end */
};

/* ---- requests ---- */

/* There are `count` requests; the head of number i is `stride` * i. */
static void number(struct bench *b, uint16_t count, uint16_t stride)
{
    CHECK(RING_SIZE % count == 0 && count * stride <= RING_SIZE);
    b->count = count;
    b->stride = stride;
}

/* The guest makes the next `n` available. */
static void offer(struct bench *b, uint32_t n)
{
    while (n--)
        driver_offer(&b->ring, (uint16_t)(b->ring.avail_idx % b->count * b->stride));
}

static uint64_t slot_addr(uint32_t slot)
{
    return GUEST_BASE + AT_BUFFER + (uint64_t)slot * SLOT;
}

/* Header, data and status: three descriptors, in the ring or in a table behind one. */
static void make_blocks(struct bench *b, uint32_t type)
{
    bool indirect = b->scenario->features & INDIRECT;
    uint16_t data_flags = VRING_DESC_F_NEXT | (type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0);

    for (uint16_t slot = 0; slot < BATCH_MAX; slot++) {
        uint64_t at = slot_addr(slot), table = GUEST_BASE + AT_TABLE + slot * TABLE;
        struct vring_desc *t = indirect ? guest_at(&b->guest, table) : b->ring.desc;
        uint16_t first = indirect ? 0 : 3 * slot;
        *(struct virtio_blk_req_hdr *)guest_at(&b->guest, at + HEADER) =
            (struct virtio_blk_req_hdr){.type = type, .sector = slot * (BLOCK / 512u)};
        *(uint8_t *)guest_at(&b->guest, at + STATUS) = 0xee;
        set_desc(t, first, at + HEADER, 16, VRING_DESC_F_NEXT, first + 1);
        set_desc(t, first + 1, at + DATA, BLOCK, data_flags, first + 2);
        set_desc(t, first + 2, at + STATUS, 1, VRING_DESC_F_WRITE, 0);
        if (indirect)
            set_desc(b->ring.desc, slot, table, TABLE, VRING_DESC_F_INDIRECT, 0);
    }
    number(b, BATCH_MAX, indirect ? 1 : 3);
}

/* One buffer each. */
static void make_frames(struct bench *b, uint16_t count, uint32_t len, uint16_t flags)
{
    for (uint16_t slot = 0; slot < count; slot++)
        set_desc(b->ring.desc, slot, slot_addr(slot) + DATA, len, flags, 0);
    number(b, count, 1);
}

static uint64_t counter(const struct bench *b, enum vhost_counter c)
{
    struct vhost_stats stats;

    CHECK_EQ(vhost_device_read_stats(b->device, b->scenario->queue, &stats), 0);
    return stats.counter[c];
}

/* The guest was called once a batch. */
static void check_calls(struct bench *b, uint64_t requests)
{
    CHECK_EQ(counter(b, VHOST_COUNTER_CALLS), (requests + b->batch - 1) / b->batch);
}

/* ---- the ring alone: a device that takes all there is, then gives it back ---- */

static bool ring_service(struct vhost_queue *q)
{
    uint16_t head[BATCH_MAX];
    uint32_t n = ring_pending(q);
    struct chain c;

    uint32_t popped = 0;

    for (; popped < n && ring_pop(q, &c); popped++)
        head[popped] = c.head;
    CHECK(!q->broken);
    for (uint32_t i = 0; i < popped; i++)
        ring_push(q, head[i], 1);
    return true;
}

static int ring_open(struct vhost_queue *q)
{
    (void)q;
    return 0;
}

static void open_ring(struct bench *b)
{
    static const struct device_ops ops = {
        .queue_open = ring_open,
        .service = ring_service,
        .tracked = true,
        .chain_max = RING_SIZE,
    };
    static struct vhost_device device;

    CHECK_EQ(device_init(&device, &ops, 1), 0);
    b->device = &device;
    make_blocks(b, VIRTIO_BLK_T_IN);
}

/* ---- blk ---- */

static void open_blk(struct bench *b, uint32_t flags, int fd, uint32_t type)
{
    struct vhost_blk_config config = {
        .fd = fd,
        .flags = flags,
        .capacity = BATCH_MAX * BLOCK / 512,
        .num_queues = 1,
        .seg_max = 126,
    };

    CHECK_EQ(vhost_blk_new(&config, &b->device), 0);
    make_blocks(b, type);
}

static void open_null_read(struct bench *b)
{
    open_blk(b, VHOST_BLK_NULL, -1, VIRTIO_BLK_T_IN);
}

static void open_null_write(struct bench *b)
{
    open_blk(b, VHOST_BLK_NULL, -1, VIRTIO_BLK_T_OUT);
}

static void open_tmpfs_read(struct bench *b)
{
    int fd = memfd_create("image", MFD_CLOEXEC); /* lies on a tmpfs of the kernel's own */

    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, BATCH_MAX * BLOCK), 0);
    open_blk(b, 0, fd, VIRTIO_BLK_T_IN);
    close(fd);
}

/* An image that is no file on tmpfs; to write is then io_uring's. */
static void open_uring_write(struct bench *b)
{
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

    CHECK(fd >= 0);
    open_blk(b, 0, fd, VIRTIO_BLK_T_OUT);
    close(fd);
}

static void check_blk(struct bench *b, uint64_t requests)
{
    check_calls(b, requests);
    CHECK_EQ(counter(b, VHOST_COUNTER_COMPLETIONS), requests);
    CHECK_EQ(counter(b, VHOST_COUNTER_ERRORS), 0);
    CHECK_EQ(*(uint8_t *)guest_at(&b->guest, slot_addr(0) + STATUS), VIRTIO_BLK_S_OK);
}

static void check_tmpfs(struct bench *b, uint64_t requests)
{
    check_blk(b, requests);
    CHECK_EQ(counter(b, VHOST_COUNTER_INLINE), requests);
}

static void check_uring(struct bench *b, uint64_t requests)
{
    check_blk(b, requests);
    CHECK_EQ(*b->thread.uring.sq.khead, requests);
}

/* ---- net: a socket pair, which keeps frames apart as a tap does ---- */

static void open_net(struct bench *b)
{
    CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, b->tap), 0);
    struct vhost_net_config config = {.tap_fds = b->tap, .num_pairs = 1};
    CHECK_EQ(vhost_net_new(&config, &b->device), 0);
}

static void open_rx(struct bench *b)
{
    open_net(b);
    make_frames(b, RING_SIZE, RX_BUFFER, VRING_DESC_F_WRITE);
}

static void open_tx(struct bench *b)
{
    open_net(b);
    make_frames(b, BATCH_MAX, FRAME, 0);
}

static void network_sends(struct bench *b, uint32_t batch)
{
    static const char frame[FRAME];

    for (uint32_t i = 0; i < batch; i++)
        CHECK_EQ(write(b->tap[1], frame, FRAME), FRAME);
}

static void network_receives(struct bench *b, uint32_t batch)
{
    char frame[FRAME + 1];

    (void)batch;
    for (ssize_t n; (n = read(b->tap[1], frame, sizeof(frame))) >= 0;)
        CHECK_EQ(n, FRAME);
}

static void check_net(struct bench *b, uint64_t requests)
{
    check_calls(b, requests);
    CHECK_EQ(counter(b, VHOST_COUNTER_PACKETS), requests);
}

/* ---- the switch: from the guest to another one, which has buffers ---- */

enum { SHORT_FRAME = sizeof(struct virtio_net_hdr) + 64, OTHER_SHARE = 8, OTHER_BUFFERS = 9 };

static struct driver_ring other;

static void other_receives(struct bench *b, uint32_t batch)
{
    (void)b;
    (void)batch;
    while (driver_used_idx(&other) != other.seen)
        driver_offer(&other, (uint16_t)driver_take(&other).id);
    if (other.features & EVENT_IDX)
        driver_want_call_after(&other, 0);
    driver_publish(&other);
}

/* A card of the address that ends with `last`, which is bound to its port. */
static struct vhost_device *plug_card(struct bench *b, struct vhost_switch *sw, uint8_t last)
{
    struct vhost_switch_port_settings settings = {
        .flags = VHOST_SWITCH_BOUND, .vlan = 1, .mac = {2, 0, 0, 0, 0, last}};
    struct vhost_device *device;

    CHECK_EQ(vhost_switch_card_new(sw, 1, &settings, &device), 0);
    CHECK_EQ(vhost_switch_plug(device, 1), 0);
    iothread_take_mail(&b->thread);
    return device;
}

static void open_other(struct bench *b, struct vhost_device *device)
{
    struct vhost_queue *queue;

    other = driver_new(&b->guest, OTHER_SHARE, RING_SIZE, b->ring.features | MERGEABLE, 0);
    struct vhost_queue_config config = driver_config(&other, 0); /* where it begins */
    for (uint16_t slot = 0; slot < RING_SIZE; slot++) {
        uint64_t at = GUEST_BASE + OTHER_BUFFERS * (uint64_t)RING_SHARE + slot * UINT64_C(0x1000);
        set_desc(other.desc, slot, at, RX_BUFFER, VRING_DESC_F_WRITE, 0);
        driver_offer(&other, slot);
    }
    driver_publish(&other);
    CHECK_EQ(vhost_queue_new(&config, device, b->guest.memory, &queue), 0);
    queue->thread = &b->thread;
    CHECK(!queue->ops->service(queue));
}

static void open_switch_of(struct bench *b, uint32_t len)
{
    static const char ethernet[] = "\x02\0\0\0\0\2\x02\0\0\0\0\1\x88\xb5";
    struct vhost_switch_config config = {.stations = 256, .age_s = 300};
    struct vhost_switch *sw;

    CHECK_EQ(vhost_events_new(&b->thread.events), 0);
    b->thread.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    b->thread.message_tail = &b->thread.message;
    CHECK_EQ(vhost_switch_new(&config, &b->thread, &sw), 0);
    b->device = plug_card(b, sw, 1);
    open_other(b, plug_card(b, sw, 2));
    make_frames(b, BATCH_MAX, len, 0);
    for (uint32_t slot = 0; slot < BATCH_MAX; slot++)
        memcpy((char *)guest_at(&b->guest, slot_addr(slot) + DATA) + sizeof(struct virtio_net_hdr),
               ethernet, sizeof(ethernet) - 1);
}

static void open_switch(struct bench *b)
{
    open_switch_of(b, SHORT_FRAME);
}

static void open_switch_long(struct bench *b)
{
    open_switch_of(b, FRAME);
}

static void check_switch(struct bench *b, uint64_t requests)
{
    check_net(b, requests);
    CHECK_EQ(driver_used_idx(&other), (uint16_t)requests);
}

/* ---- all of them ---- */

static const struct scenario scenarios[] = {
    {.name = "ring-direct", .open = open_ring, .check = check_calls},
    {.name = "ring-direct-event", .features = EVENT_IDX, .open = open_ring, .check = check_calls},
    {.name = "ring-indirect", .features = INDIRECT, .open = open_ring, .check = check_calls},
    {.name = "ring-indirect-event", .features = USUAL, .open = open_ring, .check = check_calls},
    {.name = "ring-inflight",
     .features = USUAL,
     .tracked = true,
     .open = open_ring,
     .check = check_calls},
    {.name = "ring-packed", .features = PACKED, .open = open_ring, .check = check_calls},
    {.name = "ring-packed-event",
     .features = PACKED | USUAL,
     .open = open_ring,
     .check = check_calls},
    {.name = "ring-packed-inflight",
     .features = PACKED | USUAL,
     .tracked = true,
     .open = open_ring,
     .check = check_calls},
    {.name = "blk-null-read", .features = USUAL, .open = open_null_read, .check = check_blk},
    {.name = "blk-null-write", .features = USUAL, .open = open_null_write, .check = check_blk},
    {.name = "blk-tmpfs-read", .features = USUAL, .open = open_tmpfs_read, .check = check_tmpfs},
    {.name = "blk-logged-read",
     .features = USUAL,
     .logged = true,
     .open = open_null_read,
     .check = check_blk},
    {.name = "blk-packed-read",
     .features = PACKED | USUAL,
     .open = open_null_read,
     .check = check_blk},
    {.name = "blk-packed-logged-read",
     .features = PACKED | USUAL,
     .logged = true,
     .open = open_null_read,
     .check = check_blk},
    {.name = "blk-uring-write", .features = USUAL, .open = open_uring_write, .check = check_uring},
    {.name = "blk-packed-write",
     .features = PACKED | USUAL,
     .open = open_null_write,
     .check = check_blk},
    {.name = "loop-null-write",
     .features = USUAL,
     .loop = true,
     .open = open_null_write,
     .check = check_blk},
    {.name = "blk-inflight-write",
     .features = USUAL,
     .tracked = true,
     .open = open_uring_write,
     .check = check_uring},
    {.name = "blk-packed-inflight-write",
     .features = PACKED | USUAL,
     .tracked = true,
     .open = open_uring_write,
     .check = check_uring},
    {.name = "net-rx",
     .features = USUAL | MERGEABLE,
     .ahead = RING_SIZE - BATCH_MAX,
     .open = open_rx,
     .before = network_sends,
     .check = check_net},
    {.name = "net-tx",
     .features = USUAL,
     .queue = 1,
     .open = open_tx,
     .before = network_receives,
     .check = check_net},
    {.name = "net-packed-rx",
     .features = PACKED | USUAL | MERGEABLE,
     .ahead = RING_SIZE - BATCH_MAX,
     .open = open_rx,
     .before = network_sends,
     .check = check_net},
    {.name = "net-packed-tx",
     .features = PACKED | USUAL,
     .queue = 1,
     .open = open_tx,
     .before = network_receives,
     .check = check_net},
    {.name = "net-order-rx",
     .features = IN_ORDER | USUAL | MERGEABLE,
     .ahead = RING_SIZE - BATCH_MAX,
     .open = open_rx,
     .before = network_sends,
     .check = check_net},
    {.name = "net-order-tx",
     .features = IN_ORDER | USUAL,
     .queue = 1,
     .open = open_tx,
     .before = network_receives,
     .check = check_net},
    {.name = "net-packed-order-rx",
     .features = IN_ORDER | PACKED | USUAL | MERGEABLE,
     .ahead = RING_SIZE - BATCH_MAX,
     .open = open_rx,
     .before = network_sends,
     .check = check_net},
    {.name = "net-packed-order-tx",
     .features = IN_ORDER | PACKED | USUAL,
     .queue = 1,
     .open = open_tx,
     .before = network_receives,
     .check = check_net},
    {.name = "switch",
     .features = USUAL,
     .queue = 1,
     .open = open_switch,
     .before = other_receives,
     .check = check_switch},
    {.name = "switch-long",
     .features = USUAL,
     .queue = 1,
     .open = open_switch_long,
     .before = other_receives,
     .check = check_switch},
    {.name = "switch-packed",
     .features = PACKED | USUAL,
     .queue = 1,
     .open = open_switch,
     .before = other_receives,
     .check = check_switch},
};

#endif
