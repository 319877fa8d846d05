/* A switch under load: the packet generator's ports in its ports, every byte checked. */
#include "rig.h"
#include <vhost_switch.h>

enum {
    ENDS = 2,
    RING = 256,
    SHARE = 0x4000000, /* of guest memory, an end */
    AT_BUFFERS = 0x20000,
    RING_AREA = 0x8000,
    HEADER = 14,
};

#define MERGEABLE (UINT64_C(1) << VIRTIO_NET_F_MRG_RXBUF)

/* A guest's card, and the generator's port that drives it. */
struct end {
    struct vhost_device *device;
    struct vhost_queue *queue[2];
    struct vhost_packet_port *packet;
    uint8_t header[HEADER];
    int kick[2], call[2];
};

static struct guest guest;
static struct control control;
static struct vhost_switch *sw;
static struct end end[ENDS];
static struct vhost_packet_result result;

static uint64_t area(uint32_t i, uint32_t ring, uint32_t part)
{
    return GUEST_BASE + i * (uint64_t)SHARE + ring * UINT64_C(0x10000) + part * UINT64_C(0x2000);
}

static struct vhost_packet_ring packet_ring(uint32_t i, uint32_t ring)
{
    return (struct vhost_packet_ring){
        .desc = area(i, ring, 0),
        .avail = area(i, ring, 2),
        .used = area(i, ring, 3),
        .size = RING,
        .kick_fd = end[i].kick[ring],
        .call_fd = end[i].call[ring],
    };
}

static int settings_of(struct vhost_switch_port_settings *s)
{
    *s = (struct vhost_switch_port_settings){.stations = 16, .vlan = 1};
    return 0;
}

static void end_open(uint32_t i, uint64_t features)
{
    struct end *e = &end[i];
    struct vhost_switch_port_settings settings;

    settings_of(&settings);
    CHECK_EQ(vhost_switch_card_new(sw, 1, &settings, &e->device), 0);
    CHECK_EQ(vhost_switch_plug(e->device, ++control.token), 0);
    CHECK_EQ(await_done(&control).result, 0);
    memcpy(e->header, "\x02\0\0\0\0\2\x02\0\0\0\0\1\x88\xb5", HEADER);
    e->header[5] = (uint8_t)(2 - i);
    e->header[11] = (uint8_t)(1 + i);
    for (uint32_t ring = 0; ring < 2; ring++) {
        e->kick[ring] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        e->call[ring] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    struct vhost_packet_port_config config = {
        .memory = guest.host,
        .memory_size = guest.size,
        .guest_addr = GUEST_BASE,
        .rx = packet_ring(i, 0),
        .tx = packet_ring(i, 1),
        .buffers = GUEST_BASE + i * (uint64_t)SHARE + AT_BUFFERS,
        .buffers_size = SHARE - AT_BUFFERS,
        .rx_buffer_size =
            features & MERGEABLE ? 1526 : VHOST_PACKET_MAX + sizeof(struct virtio_net_hdr),
        .flags = (features & EVENT_IDX ? VHOST_PACKET_EVENT_IDX : 0) |
                 (features & MERGEABLE ? VHOST_PACKET_MERGEABLE : 0) |
                 (features & PACKED ? VHOST_PACKET_PACKED : 0),
        .header = e->header,
        .header_len = HEADER,
    };
    CHECK_EQ(vhost_packet_port_new(&config, &e->packet), 0);
    for (uint32_t ring = 0; ring < 2; ring++) {
        struct vhost_queue_config queue = {
            .token = 1000 + 2 * i + ring,
            .features = features,
            .desc = area(i, ring, 0),
            .avail = area(i, ring, 2),
            .used = area(i, ring, 3),
            .index = ring,
            .size = RING,
            .next_index = features & PACKED ? 0x80008000 : 0,
            .enabled = true,
            .kick_fd = e->kick[ring],
            .call_fd = e->call[ring],
            .err_fd = -1,
        };
        CHECK_EQ(vhost_queue_new(&queue, e->device, guest.memory, &e->queue[ring]), 0);
        queue_run(&control, e->queue[ring]);
    }
}

static void end_close(struct end *e)
{
    for (uint32_t ring = 0; ring < 2; ring++) {
        queue_halt(&control, e->queue[ring]);
        CHECK_EQ(vhost_queue_free(e->queue[ring]), 0);
        close(e->kick[ring]);
        close(e->call[ring]);
    }
    CHECK_EQ(vhost_switch_free(sw), -EBUSY);
    CHECK_EQ(vhost_switch_unplug(e->device, ++control.token), 0);
    CHECK_EQ(await_done(&control).result, 0);
    vhost_device_free(e->device);
    vhost_packet_port_free(e->packet);
}

static void open_all(uint64_t features, uint32_t poll_us)
{
    struct vhost_switch_config config = {.stations = 256, .age_s = 300};

    guest = guest_new(ENDS * (uint64_t)SHARE, 0);
    control = control_new(VHOST_IOTHREAD_NO_IO_URING, poll_us);
    CHECK_EQ(vhost_switch_new(&config, control.thread, &sw), 0);
    for (uint32_t i = 0; i < ENDS; i++)
        end_open(i, VERSION_1 | features);
}

static void close_all(void)
{
    for (uint32_t i = 0; i < ENDS; i++)
        end_close(&end[i]);
    CHECK_EQ(vhost_switch_free(sw), 0);
    control_free(&control);
    guest_free(&guest);
}

static struct vhost_packet_config load_of(uint32_t flags)
{
    return (struct vhost_packet_config){
        .port_a = end[0].packet,
        .port_b = end[1].packet,
        .packets = 500,
        .seed = 7,
        .packet_size = 128,
        .depth = 32,
        .lost_ms = PATIENCE_MS,
        .stall_ms = PATIENCE_MS,
        .flags = flags,
        .cpu = -1,
    };
}

static void run_perfectly(const struct vhost_packet_config *load)
{
    CHECK_EQ(vhost_packet_run(load, &result), 0);
    CHECK_EQ(result.sent, load->packets);
    CHECK_EQ(result.received, load->packets);
    CHECK_EQ(result.corrupt, 0);
    CHECK_EQ(result.foreign, 0);
    CHECK_EQ(result.stale, 0);
}

static void every_size_crosses_whole(void)
{
    static const uint32_t size[] = {60, 64, 127, 1518, 9000, 65000, VHOST_PACKET_MAX};

    for (uint32_t way = 0; way < 16; way++) {
        open_all((way & 1 ? EVENT_IDX : 0) | (way & 2 ? MERGEABLE : 0) | (way & 4 ? PACKED : 0),
                 way & 8 ? 50 : 0);
        for (size_t i = 0; i < ARRAY_SIZE(size); i++) {
            struct vhost_packet_config load =
                load_of(VHOST_PACKET_VERIFY | (way & 8 ? VHOST_PACKET_POLL : 0) |
                        (i & 1 ? VHOST_PACKET_ROUND_TRIP : 0));
            load.packet_size = size[i];
            load.depth = size[i] > 10000 ? 2 : 32;
            load.packets = size[i] > 10000 ? 20 : 500;
            run_perfectly(&load);
        }
        uint64_t counter[VHOST_SWITCH_COUNTERS];
        vhost_switch_read_counters(end[0].device, counter);
        uint64_t in = counter[VHOST_SWITCH_IN_FRAMES];
        vhost_switch_read_counters(end[1].device, counter);
        CHECK_EQ(counter[VHOST_SWITCH_OUT_FRAMES], in);
        close_all();
    }
}

/* One at a time: whoever misses a kick or a call waits for ever. */
static void no_wake_up_is_lost(void)
{
    for (uint32_t way = 0; way < 4; way++) {
        open_all((way & 1 ? EVENT_IDX : 0) | (way & 2 ? PACKED : 0), 0);
        struct vhost_packet_config load = load_of(VHOST_PACKET_ROUND_TRIP);
        load.depth = 1;
        load.packets = 3000;
        run_perfectly(&load);
        CHECK(result.sleeps > 0);
        close_all();
    }
}

static void *load_thread(void *arg)
{
    struct vhost_packet_config load = load_of(VHOST_PACKET_VERIFY);

    load.packets = 30000;
    load.lost_ms = 20;
    CHECK_EQ(vhost_packet_run(&load, &result), 0);
    atomic_store((atomic_bool *)arg, true);
    return NULL;
}

/* Settings, ports, and whoever reads the table come and go; no frame comes that is not whole. */
static void all_may_change_under_load(void)
{
    struct vhost_switch_port_settings settings;
    struct vhost_switch_station out[16];
    struct vhost_device *other;
    atomic_bool done = false;
    pthread_t thread;

    open_all(EVENT_IDX | MERGEABLE, 50);
    settings_of(&settings);
    CHECK_EQ(pthread_create(&thread, NULL, load_thread, &done), 0);
    for (uint32_t turn = 0; !atomic_load(&done); turn++) {
        settings.trunk[turn % 64] ^= UINT64_C(1) << (turn / 64 % 62 + 1);
        CHECK_EQ(vhost_switch_set(end[turn % 2].device, &settings, ++control.token), 0);
        CHECK_EQ(await_done(&control).result, 0);
        CHECK_EQ(vhost_switch_card_new(sw, 2, &settings, &other), 0);
        CHECK_EQ(vhost_switch_port_number(other), 2);
        CHECK_EQ(vhost_switch_plug(other, ++control.token), 0);
        CHECK_EQ(await_done(&control).result, 0);
        CHECK_EQ(vhost_switch_read_stations(sw, out, 16, ++control.token), 0);
        CHECK(await_done(&control).value <= 2);
        CHECK_EQ(vhost_switch_unplug(other, ++control.token), 0);
        CHECK_EQ(await_done(&control).result, 0);
        vhost_device_free(other);
        if (turn % 8 == 0) {
            CHECK_EQ(vhost_switch_unplug(end[1].device, ++control.token), 0);
            CHECK_EQ(await_done(&control).result, 0);
            CHECK_EQ(vhost_switch_plug(end[1].device, ++control.token), 0);
            CHECK_EQ(await_done(&control).result, 0);
        }
    }
    pthread_join(thread, NULL);
    CHECK_EQ(result.corrupt, 0);
    CHECK_EQ(result.foreign, 0);
    CHECK(result.received > 0);
    close_all();
}

static void what_cannot_be_is_refused(void)
{
    struct vhost_switch_port_settings good, s;
    struct vhost_device *device;

    open_all(0, 0);
    settings_of(&good);
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        s = good;                                                                                  \
        change;                                                                                    \
        CHECK_EQ(vhost_switch_card_new(sw, 1, &s, &device), -EINVAL);                              \
        CHECK_EQ(vhost_switch_set(end[0].device, &s, 1), -EINVAL);                                 \
    } while (0)
    REFUSED(s.vlan = 4095);
    REFUSED(s.vlan = 4096);
    REFUSED(s.trunk[0] = 1);
    REFUSED(s.trunk[63] = UINT64_C(1) << 63);
    REFUSED(s.flags = VHOST_SWITCH_BOUND; s.mac[0] = 1);
#undef REFUSED
    CHECK_EQ(vhost_switch_card_new(sw, 0, &good, &device), -EINVAL);
    CHECK_EQ(vhost_switch_card_new(sw, 129, &good, &device), -EINVAL);
    CHECK_EQ(vhost_switch_tap_new(sw, -1, &good, &device), -EBADF);
    CHECK_EQ(vhost_switch_plug(end[0].device, ++control.token), 0);
    CHECK_EQ(await_done(&control).result, -EBUSY);
    close_all();
}

static void a_switch_has_so_many_ports(void)
{
    static struct vhost_device *device[VHOST_SWITCH_PORTS];
    struct vhost_switch_port_settings settings;

    open_all(0, 0);
    settings_of(&settings);
    for (uint32_t i = ENDS; i < VHOST_SWITCH_PORTS; i++)
        CHECK_EQ(vhost_switch_card_new(sw, 1, &settings, &device[i]), 0);
    CHECK_EQ(vhost_switch_card_new(sw, 1, &settings, &device[0]), -ENOSPC);
    vhost_device_free(device[100]);
    CHECK_EQ(vhost_switch_card_new(sw, 1, &settings, &device[100]), 0);
    CHECK_EQ(vhost_switch_port_number(device[100]), 100);
    for (uint32_t i = ENDS; i < VHOST_SWITCH_PORTS; i++)
        vhost_device_free(device[i]);
    close_all();
}

static const struct test tests[] = {
    TEST(every_size_crosses_whole),   TEST(no_wake_up_is_lost),
    TEST(all_may_change_under_load),  TEST(what_cannot_be_is_refused),
    TEST(a_switch_has_so_many_ports),
};
MAIN(tests)
