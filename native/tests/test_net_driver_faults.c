/* The packet generator over wires that lose, damage, repeat and invent frames, and that lie. */
#include "internal.h"
#include "packet_run.h"

/* Over a wire that is polled; the sums must hold all the same. */
static void run_with(struct faults faults, const struct vhost_packet_config *load)
{
    wire.faults = faults;
    wire.polls = true;
    CHECK_EQ(run(load), 0);
    check_sums(load);
}

/* Whatever a slow machine delays for so long is stale when it comes. */
enum { LOST_MS = 50 };

static void drops_are_counted(void)
{
    for (uint32_t way = 0; way < 4; way++) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
        struct vhost_packet_config load = load_of(&wire, way & 1 ? VHOST_PACKET_POLL : 0);
        load.depth = way & 2 ? 0 : 16;
        load.lost_ms = LOST_MS;
        run_with((struct faults){.drop = 200}, &load);
        CHECK_EQ(result.lost - result.stale, 10);
        CHECK_EQ(result.corrupt + result.foreign, 0);
        wire_close(&wire);
    }
}

/* So many that their sequence numbers come round before the run ends. */
static void drops_are_counted_without_a_limit(void)
{
    wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
    struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_POLL);
    load.depth = 0;
    load.lost_ms = LOST_MS;
    load.packets = 200000;
    run_with((struct faults){.drop = 200}, &load);
    CHECK_EQ(result.lost - result.stale, 1000);
    wire_close(&wire);
}

static void a_lost_frame_returns_its_place(void)
{
    for (uint32_t depth = 1; depth <= 5; depth += 4) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
        struct vhost_packet_config load = load_of(&wire, 0);
        load.depth = depth;
        load.lost_ms = LOST_MS;
        load.packets = 2 * depth;
        run_with((struct faults){.drop = 1}, &load);
        CHECK_EQ(result.lost, load.packets);
        CHECK(result.elapsed_ns >= LOST_MS * 1000000ull); /* the second half waits for the first */
        wire_close(&wire);
    }
}

/* The second of three is on its way until it was given up for the third. */
static void what_comes_too_late_is_stale(void)
{
    wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
    struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY);
    load.depth = 1;
    load.lost_ms = 500;
    load.packets = 3;
    run_with((struct faults){.hold = 2}, &load);
    CHECK_EQ(result.lost, 1);
    CHECK_EQ(result.stale, 1);
    wire_close(&wire);
}

static void duplicates_are_received_once(void)
{
    for (uint32_t way = 0; way < 4; way++) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX, .mergeable = way & 1});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY);
        load.depth = way & 2 ? 0 : 16;
        run_with((struct faults){.duplicate = 7}, &load);
        CHECK_EQ(result.received, load.packets);
        CHECK_EQ(result.stale, load.packets / 7);
        CHECK_EQ(result.corrupt + result.foreign, 0);
        wire_close(&wire);
    }
}

static void order_does_not_matter(void)
{
    for (uint32_t depth = 0; depth <= 16; depth += 16) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY | VHOST_PACKET_POLL);
        load.depth = depth;
        load.packets = 2000; /* not a multiple: the last is not held */
        run_with((struct faults){.hold = 3}, &load);
        check_perfect(&load);
        wire_close(&wire);
    }
}

static void a_wrong_byte_is_noticed(void)
{
    static const uint32_t at[] = {WIRE_HEADER + 14 + VHOST_PACKET_STAMP, 99, UINT32_MAX};

    for (uint32_t way = 0; way < 4; way++) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX, .mergeable = way & 1});
        for (size_t i = 0; i < ARRAY_SIZE(at); i++) {
            struct vhost_packet_config load = load_of(&wire, way & 2 ? VHOST_PACKET_VERIFY : 0);
            wire.port[0].sent = 0;
            struct faults faults = {.corrupt = 10, .corrupt_at = at[i], .part = way & 1 ? 40 : 0};
            run_with(faults, &load);
            CHECK_EQ(result.received, load.packets);
            CHECK_EQ(result.corrupt, way & 2 ? load.packets / 10 : 0);
            CHECK_EQ(result.stale + result.foreign, 0);
        }
        wire_close(&wire);
    }
}

static void a_wrong_length_is_noticed_always(void)
{
    for (uint32_t flags = 0; flags <= VHOST_PACKET_VERIFY; flags += VHOST_PACKET_VERIFY) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
        struct vhost_packet_config load = load_of(&wire, flags);
        run_with((struct faults){.cut = 10}, &load);
        CHECK_EQ(result.received, load.packets);
        CHECK_EQ(result.corrupt, load.packets / 10);
        CHECK_EQ(result.bytes, load.packets * load.packet_size - result.corrupt);
        wire_close(&wire);
    }
}

/* One in ten at b, and of the rest that was sent back one in ten at a. */
static void both_ends_of_a_round_trip_look(void)
{
    wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
    struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_ROUND_TRIP | VHOST_PACKET_VERIFY);
    run_with((struct faults){.corrupt = 10, .corrupt_at = 99}, &load);
    CHECK_EQ(result.received, load.packets);
    CHECK_EQ(result.corrupt, 200 + 180);
    wire_close(&wire);
}

static void a_wrong_stamp_is_nobodys(void)
{
    static const uint32_t at[] = {0, 3, 4, 7, 8, 15}; /* tag, sequence, time */

    for (size_t i = 0; i < ARRAY_SIZE(at); i++) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_POLL);
        load.lost_ms = LOST_MS;
        run_with((struct faults){.corrupt = 200, .corrupt_at = WIRE_HEADER + 14 + at[i]}, &load);
        CHECK_EQ(result.foreign, at[i] < 8 ? 10 : 0);
        CHECK(result.stale >= (at[i] < 8 ? 0 : 10));
        CHECK_EQ(result.lost, result.stale + result.foreign);
        wire_close(&wire);
    }
}

/* What is on its way to a when b has the last frame is left to the next run. */
static void foreign_frames_are_told_apart(void)
{
    for (uint32_t way = 0; way < 4; way++) {
        bool echo = way & 2;
        struct wire_setup setup = {.mergeable = way & 1, .echo = echo, .alike = true};
        wire_open(&wire, &setup);
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY);
        run_with((struct faults){.stranger = 7}, &load);
        CHECK_EQ(result.received, load.packets);
        CHECK_EQ(result.corrupt + result.stale, 0);
        uint64_t foreign = result.foreign;
        run_with((struct faults){0}, &load);
        CHECK_EQ(result.received, load.packets);
        CHECK_EQ(foreign + result.foreign, (echo ? 2 : 3) * (load.packets / 7));
        wire_close(&wire);
    }
}

static void notice_lies(uint64_t features, enum lie end)
{
    for (uint32_t i = 0; i < 2 * (end - 1); i++) {
        wire_open(&wire, &(struct wire_setup){.features = features, .mergeable = true});
        struct vhost_packet_config load = load_of(&wire, i & 1 ? VHOST_PACKET_POLL : 0);
        load.packets = 500;
        CHECK_EQ(run(&load), 0); /* the rings are full of what was true once */
        wire.port[0].sent = wire.port[1].delivered = 0;
        wire.faults.lie = 1 + i / 2;
        CHECK_EQ(run(&load), -EPROTO);
        wire.faults.lie = HONEST;
        CHECK_EQ(run(&load), -EPROTO); /* what the device holds is not known any more */
        wire_close(&wire);
    }
}

static void a_broken_ring_is_noticed(void)
{
    notice_lies(EVENT_IDX, ORDERS);
    notice_lies(EVENT_IDX | IN_ORDER, LIES);
}

/* ---- packed rings, whose device is played here: of two frames that were sent, 0 and 1 ---- */

static void say(struct wire_port *p, uint32_t ring, uint16_t at, uint16_t id, uint32_t len)
{
    struct vring_packed_desc *slot = &p->ring[ring].packed->slot[at];

    slot->id = id;
    slot->len = len;
    __atomic_store_n(&slot->flags, AVAIL | USED, __ATOMIC_RELEASE);
}

static void use_both(struct wire_port *p, bool in_order)
{
    if (in_order) {
        say(p, 1, 0, 1, 0);
        return;
    }
    say(p, 1, 0, 0, 0);
    say(p, 1, 1, 1, 0);
}

static void a_lie_in_a_packed_ring_is_noticed(void)
{
    static const struct {
        uint32_t ring;
        uint16_t id;
        uint32_t len;
    } lie[] = {
        {0, 256, 0},        /* out of range */
        {0, 0, 1527},       /* longer than the buffer */
        {1, 15, 0},         /* not sent */
        {1, UINT16_MAX, 0}, /* out of range */
    };

    for (uint32_t way = 0; way < 2 * ARRAY_SIZE(lie); way++) {
        bool in_order = way & 1;
        uint64_t features = PACKED | (in_order ? IN_ORDER : 0);
        wire_open(&wire, &(struct wire_setup){.features = features, .mergeable = true});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_POLL);
        load.stall_ms = 5;
        load.depth = load.packets = 2;
        CHECK_EQ(vhost_packet_run(&load, &result), -ETIMEDOUT);
        if (lie[way / 2].ring == 0)
            use_both(&wire.port[0], in_order);
        say(&wire.port[0], lie[way / 2].ring, 0, lie[way / 2].id, lie[way / 2].len);
        CHECK_EQ(vhost_packet_run(&load, &result), -EPROTO);
        wire_close(&wire);
    }
}

/* The same without a lie: both slots are back, and nothing came. */
static void a_truth_in_a_packed_ring_is_taken(void)
{
    for (uint32_t in_order = 0; in_order < 2; in_order++) {
        uint64_t features = PACKED | (in_order ? IN_ORDER : 0);
        wire_open(&wire, &(struct wire_setup){.features = features, .mergeable = true});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_POLL);
        load.stall_ms = 5;
        load.depth = load.packets = 2;
        CHECK_EQ(vhost_packet_run(&load, &result), -ETIMEDOUT);
        CHECK_EQ(vhost_packet_run(&load, &result), -EBUSY);
        use_both(&wire.port[0], in_order);
        CHECK_EQ(vhost_packet_run(&load, &result), -ETIMEDOUT);
        CHECK_EQ(result.sent, 2);
        wire_close(&wire);
    }
}

static void num_buffers_counts_where_it_was_negotiated(void)
{
    for (enum lie lie = RX_NO_BUFFERS; lie <= RX_MANY_BUFFERS; lie++) {
        wire_open(&wire, &(struct wire_setup){.features = EVENT_IDX});
        struct vhost_packet_config load = load_of(&wire, VHOST_PACKET_VERIFY);
        run_with((struct faults){.lie = lie}, &load);
        check_perfect(&load);
        wire_close(&wire);
    }
}

static void a_device_that_does_not_answer_is_given_up(void)
{
    for (uint32_t way = 0; way < 4; way++) {
        wire_open(&wire, &(struct wire_setup){.features = way & 2 ? EVENT_IDX : 0});
        struct vhost_packet_config load = load_of(&wire, way & 1 ? VHOST_PACKET_POLL : 0);
        load.stall_ms = 5;
        CHECK_EQ(vhost_packet_run(&load, &result), -ETIMEDOUT);
        CHECK_EQ(result.sent, load.depth);
        CHECK_EQ(result.received + result.lost, 0);
        CHECK_EQ(vhost_packet_run(&load, &result), -EBUSY);
        /* The device comes to life, and the old frames with it. */
        wire_start(&wire);
        while (driver_used_idx(&wire.port[0].ring[1]) != load.depth)
            sched_yield();
        wire_halt(&wire);
        load.stall_ms = PATIENCE_MS;
        CHECK_EQ(run(&load), 0);
        CHECK_EQ(result.received, load.packets);
        CHECK_EQ(result.foreign, load.depth);
        wire_close(&wire);
    }
}

static const struct test tests[] = {
    TEST(drops_are_counted),
    TEST(drops_are_counted_without_a_limit),
    TEST(a_lost_frame_returns_its_place),
    TEST(what_comes_too_late_is_stale),
    TEST(duplicates_are_received_once),
    TEST(order_does_not_matter),
    TEST(a_wrong_byte_is_noticed),
    TEST(a_wrong_length_is_noticed_always),
    TEST(both_ends_of_a_round_trip_look),
    TEST(a_wrong_stamp_is_nobodys),
    TEST(foreign_frames_are_told_apart),
    TEST(a_broken_ring_is_noticed),
    TEST(a_lie_in_a_packed_ring_is_noticed),
    TEST(a_truth_in_a_packed_ring_is_taken),
    TEST(num_buffers_counts_where_it_was_negotiated),
    TEST(a_device_that_does_not_answer_is_given_up),
};
MAIN(tests)
