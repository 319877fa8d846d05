/* The packet generator over a wire that works, over the net device, and what it refuses. */
#include "packet_run.h"
#include "rig.h"
#include <sys/socket.h>

/* ---- a wire that works ---- */

static void every_size_crosses_whole(void)
{
    static const uint32_t size[] = {60, 64, 127, 1518, 9000, 65000, VHOST_PACKET_MAX};

    for (uint32_t way = 0; way < 8; way++) {
        struct wire_setup setup = {.features = EVENT_IDX | (way / 2 == 3 ? IN_ORDER : 0),
                                   .mergeable = way & 1,
                                   .echo = way / 2 == 2};
        setup.size = setup.mergeable ? 256 : 64;
        wire_open(&wire, &setup);
        for (size_t i = 0; i < ARRAY_SIZE(size); i++) {
            struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY);
            load.flags |= way / 2 == 1 ? VHOST_PACKET_ROUND_TRIP : 0;
            load.packet_size = size[i];
            load.packets = size[i] > 10000 ? 20 : 200;
            CHECK_EQ(run(&load), 0);
            check_perfect(&load);
        }
        wire_close(&wire);
    }
}

static void every_way_to_wait(void)
{
    for (uint32_t way = 0; way < 36; way++) {
        uint64_t features = (way & 1 ? EVENT_IDX : 0) | (way & 32 ? IN_ORDER : 0);
        struct wire_setup setup = {.features = features, .mergeable = way & 2};
        wire_open(&wire, &setup);
        wire.polls = way & 4;
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY);
        load.flags |= way & 8 ? VHOST_PACKET_POLL : 0;
        load.flags |= way & 16 ? VHOST_PACKET_ROUND_TRIP : 0;
        load.packets = 1000;
        CHECK_EQ(run(&load), 0);
        check_perfect(&load);
        if (load.flags & VHOST_PACKET_POLL) {
            CHECK_EQ(wire.calls, 0);
            CHECK_EQ(result.sleeps, 0);
        }
        if (wire.polls)
            CHECK_EQ(result.kicks, 0);
        else
            CHECK(result.kicks > 0);
        wire_close(&wire);
    }
}

/* One at a time: whoever misses a kick or a call waits for ever. */
static void no_wake_up_is_lost(void)
{
    for (uint64_t features = 0; features <= EVENT_IDX; features += EVENT_IDX) {
        wire_open(&wire, &(struct wire_setup){.features = features});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_ROUND_TRIP);
        load.depth = 1;
        load.packets = 5000;
        CHECK_EQ(run(&load), 0);
        check_perfect(&load);
        CHECK(result.sleeps > 0);
        wire_close(&wire);
    }
}

/* ...and the indexes of the rings wrap meanwhile. */
static void runs_follow(uint64_t features, uint64_t packets)
{
    wire_open(&wire, &(struct wire_setup){.features = features, .next_index = 64000});
    wire.polls = true;
    for (int i = 0; i < 5; i++) {
        struct vhost_packet_config load = load_of(&wire, i & 1 ? VHOST_PACKET_POLL : 0);
        load.packets = packets;
        load.packet_size = i & 2 ? 1000 : 60; /* so slots move */
        CHECK_EQ(run(&load), 0);
        check_perfect(&load);
    }
    wire_close(&wire);
}

static void runs_follow_one_another(void)
{
    runs_follow(EVENT_IDX, 20000);
    runs_follow(EVENT_IDX | IN_ORDER, 500); /* 1536 before they wrap */
}

static void the_depth_is_kept(void)
{
    static const uint32_t depth[] = {1, 2, 3, 100, 255};

    for (size_t i = 0; i < ARRAY_SIZE(depth); i++) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_POLL);
        wire.depth = load.depth = depth[i];
        CHECK_EQ(run(&load), 0);
        check_perfect(&load);
        wire_close(&wire);
    }
}

static void without_a_depth_the_rings_are_the_limit(void)
{
    for (uint32_t way = 0; way < 4; way++) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX, .size = 16});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY);
        load.flags |= (way & 1 ? VHOST_PACKET_POLL : 0) | (way & 2 ? VHOST_PACKET_ROUND_TRIP : 0);
        load.depth = 0;
        load.packets = 3000;
        CHECK_EQ(run(&load), 0);
        check_perfect(&load);
        wire_close(&wire);
    }
}

static void a_run_ends_after_its_time(void)
{
    wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
    struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_POLL);
    load.packets = 0;
    load.duration_ns = 5000000;
    load.cpu = sched_getcpu();
    uint64_t start = now_ns();
    CHECK_EQ(run(&load), 0);
    CHECK(now_ns() - start >= load.duration_ns);
    CHECK(result.sent > 0);
    load.packets = result.sent;
    check_perfect(&load);
    wire_close(&wire);
}

/* At last of buffers that are full. */
static void frames_in_pieces_are_put_together(void)
{
    static const uint32_t part[] = {12, 13, 20, 40, 1000, 0, 0};

    for (size_t way = 0; way < 2 * ARRAY_SIZE(part); way++) {
        size_t i = way / 2;
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX | (way & 1 ? IN_ORDER : 0),
                                              .mergeable = true,
                                              .buffer = part[i] ? 1526 : 300});
        wire.faults.part = part[i];
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_ROUND_TRIP);
        load.flags |= i & 1 ? VHOST_PACKET_POLL : VHOST_PACKET_VERIFY;
        load.packet_size = 1000;
        load.packets = 300;
        CHECK_EQ(run(&load), 0);
        check_perfect(&load);
        wire_close(&wire);
    }
}

static void the_rest_of_a_frame_is_waited_for(void)
{
    for (uint64_t order = 0; order <= IN_ORDER; order += IN_ORDER) {
        wire_open(&wire, &(struct wire_setup){
                             .features = EVENT_IDX | order, .mergeable = true, .buffer = 100});
        wire.faults.dribble = true;
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY);
        load.packet_size = 500;
        load.packets = 100;
        CHECK_EQ(run(&load), 0);
        check_perfect(&load);
        wire_close(&wire);
    }
}

/* The device keeps the heads of all slots until the driver has nothing else to wait for. */
static void slots_are_waited_for(void)
{
    for (uint32_t way = 0; way < 4; way++) {
        uint64_t features = (way & 1 ? 0 : EVENT_IDX) | (way & 2 ? IN_ORDER : 0);
        wire_open(&wire, &(struct wire_setup){.features = features, .size = 16});
        struct vhost_packet_config load = load_of(&wire, way & 1 ? VHOST_PACKET_POLL : 0);
        load.depth = 0;
        load.packets = 1000;
        wire.faults = (struct faults){.hoard = 16, .hoard_end = 1000};
        CHECK_EQ(run(&load), 0);
        check_perfect(&load);
        wire_close(&wire);
    }
}

/* ---- what is refused ---- */

static void a_wrong_port_is_refused(void)
{
    struct wire_setup setup = {.features = EVENT_IDX};
    struct vhost_packet_port *port;

    wire_open(&wire, &setup);
    vhost_packet_port_free(wire.port[1].packet);
    wire.port[1].packet = NULL;
    for (int r = 0; r < 2; r++)
        memset(wire.port[1].ring[r].avail, 0, 4);
    const struct vhost_packet_port_config good = wire_config(&wire, &setup, 1);
    struct vhost_packet_port_config c;
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        c = good;                                                                                  \
        change;                                                                                    \
        CHECK_EQ(vhost_packet_port_new(&c, &port), -EINVAL);                                       \
    } while (0)
    REFUSED(c.rx.size = 0);
    REFUSED(c.rx.size = 63);
    REFUSED(c.tx.size = 65536);
    REFUSED(c.rx.desc += 8);
    REFUSED(c.rx.avail += 1);
    REFUSED(c.tx.used += 2);
    REFUSED(c.tx.desc = 0);
    REFUSED(c.tx.avail = GUEST_BASE + wire.guest.size - 64);
    REFUSED(c.tx.used = UINT64_MAX - 3);
    REFUSED(c.buffers += 8);
    REFUSED(c.buffers_size = 256 * WIRE_FRAME_MAX);
    REFUSED(c.buffers_size = wire.guest.size);
    REFUSED(c.rx_buffer_size = 71);
    REFUSED(c.rx_buffer_size = WIRE_FRAME_MAX + 1);
    REFUSED(c.header = NULL);
    REFUSED(c.header_len = VHOST_PACKET_HEADER_MAX + 1);
    REFUSED(c.flags |= VHOST_PACKET_POLL);
    REFUSED(wire.port[1].ring[1].avail[1]++); /* in use */
#undef REFUSED
    wire_close(&wire);
}

static void a_wrong_run_is_refused(void)
{
    wire_open(&wire, &(struct wire_setup){.buffer = 1512});
    const struct vhost_packet_config good = load_of(&wire, 0);
    struct vhost_packet_config c;
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        c = good;                                                                                  \
        change;                                                                                    \
        CHECK_EQ(vhost_packet_run(&c, &result), -EINVAL);                                          \
    } while (0)
    REFUSED(c.port_a = NULL);
    REFUSED(c.port_b = NULL);
    REFUSED(c.packets = 0);
    REFUSED(c.packet_size = VHOST_PACKET_MIN - 1);
    REFUSED(c.packet_size = 1501); /* than which the buffers are shorter */
    REFUSED(c.packet_size = VHOST_PACKET_MAX + 1);
    REFUSED(c.depth = VHOST_PACKET_DEPTH_MAX + 1);
    REFUSED(c.lost_ms = 0);
    REFUSED(c.flags = VHOST_PACKET_EVENT_IDX);
    REFUSED(c.cpu = 1 << 20);
    REFUSED(c.port_b = c.port_a; c.flags = VHOST_PACKET_ROUND_TRIP);
    wire.faults = (struct faults){0};
    CHECK_EQ(run(&good), 0); /* nothing of that left a trace */
    check_perfect(&good);
    wire_close(&wire);
}

static void a_port_must_fit_the_run(void)
{
    struct wire_setup setup = {.mergeable = true, .size = 4};

    wire_open(&wire, &setup);
    struct vhost_packet_config load = load_of(&wire, 0);
    load.packet_size = 4 * 1526; /* without room for the virtio-net header */
    CHECK_EQ(vhost_packet_run(&load, &result), -EINVAL);

    vhost_packet_port_free(wire.port[1].packet);
    struct vhost_packet_port_config c = wire_config(&wire, &setup, 1);
    for (int r = 0; r < 2; r++)
        memset(wire.port[1].ring[r].avail, 0, 4);
    c.tx.call_fd = -1;
    c.buffers_size = 4 * 1600 + 1000;
    c.header_len = 60;
    CHECK_EQ(vhost_packet_port_new(&c, &load.port_b), 0);
    wire.port[1].packet = load.port_b;
    load.flags = VHOST_PACKET_POLL;
    load.packet_size = 60 + VHOST_PACKET_STAMP - 1; /* of b's header and a stamp */
    CHECK_EQ(vhost_packet_run(&load, &result), -EINVAL);
    load.packet_size = 1000; /* for which there is no slot */
    CHECK_EQ(vhost_packet_run(&load, &result), -EINVAL);
    load.packet_size = 100;
    load.flags = 0; /* nobody would be called */
    CHECK_EQ(vhost_packet_run(&load, &result), -EINVAL);
    load.flags = VHOST_PACKET_POLL;
    wire.faults = (struct faults){0};
    CHECK_EQ(run(&load), 0);
    check_perfect(&load);
    wire_close(&wire);
}

/* ---- the net device ---- */

struct net_end {
    struct vhost_device *device;
    struct vhost_queue *queue[2];
};

static void net_open(struct net_end *e, struct control *c, const struct wire_port *p, int *tap)
{
    struct vhost_net_config config = {.tap_fds = tap, .num_pairs = 1};

    CHECK_EQ(vhost_net_new(&config, &e->device), 0);
    for (uint32_t i = 0; i < 2; i++) {
        struct vhost_queue_config queue = driver_config(&p->ring[i], i);
        CHECK_EQ(vhost_queue_new(&queue, e->device, wire.guest.memory, &e->queue[i]), 0);
        queue_run(c, e->queue[i]);
    }
}

static void net_close(struct net_end *e, struct control *c)
{
    for (uint32_t i = 0; i < 2; i++) {
        queue_halt(c, e->queue[i]);
        CHECK_EQ(vhost_queue_free(e->queue[i]), 0);
    }
    vhost_device_free(e->device);
}

/* Two devices whose "taps" are the two ends of a socket that keeps frames apart. */
static void the_net_device_keeps_every_byte(void)
{
    static const uint32_t size[] = {60, 1518, 9000, 65000};
    static const uint64_t others[] = {0, PACKED, IN_ORDER, PACKED | IN_ORDER};
    const uint64_t mergeable = UINT64_C(1) << VIRTIO_NET_F_MRG_RXBUF;
    int tap[2];

    for (uint32_t way = 0; way < 7; way++) {
        struct control control = control_new(0, way & 1 ? 50 : 0);
        uint64_t features = VERSION_1 | EVENT_IDX | mergeable | others[way < 4 ? 0 : way - 3];
        struct net_end end[2];
        wire_open(&wire, &(struct wire_setup){.features = features, .mergeable = true});
        CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, tap), 0);
        for (int i = 0; i < 2; i++)
            net_open(&end[i], &control, &wire.port[i], &tap[i]);
        for (size_t i = 0; i < ARRAY_SIZE(size); i++) {
            uint32_t flags = VHOST_PACKET_VERIFY | VHOST_PACKET_ROUND_TRIP;
            struct vhost_packet_config load =
                load_of(&wire, flags | (way & 2 ? VHOST_PACKET_POLL : 0));
            load.packet_size = size[i];
            load.depth = size[i] > 10000 ? 1 : 8; /* so much fits into the socket */
            load.packets = 200;
            CHECK_EQ(vhost_packet_run(&load, &result), 0);
            check_perfect(&load);
        }
        for (int i = 0; i < 2; i++) {
            net_close(&end[i], &control);
            close(tap[i]);
        }
        control_free(&control);
        wire_close(&wire);
    }
}

static const struct test tests[] = {
    TEST(every_size_crosses_whole),
    TEST(every_way_to_wait),
    TEST(no_wake_up_is_lost),
    TEST(runs_follow_one_another),
    TEST(the_depth_is_kept),
    TEST(without_a_depth_the_rings_are_the_limit),
    TEST(a_run_ends_after_its_time),
    TEST(frames_in_pieces_are_put_together),
    TEST(the_rest_of_a_frame_is_waited_for),
    TEST(slots_are_waited_for),
    TEST(a_wrong_port_is_refused),
    TEST(a_wrong_run_is_refused),
    TEST(a_port_must_fit_the_run),
    TEST(the_net_device_keeps_every_byte),
};
MAIN(tests)
