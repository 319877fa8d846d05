/*
 * Frames of any form through the switch: from the guest to a card that can finish nothing and to a
 * tap, and from the tap to the guest.  The tap is a socket pair, which keeps frames apart; what
 * comes from there is the guest's own memory.
 */
#include "guest.h"
#include "switch.h"
#include <sys/epoll.h>
#include <sys/socket.h>

enum {
    MERGEABLE = 1, /* of setup.device */
    OFFLOADS = 2,
    TRUNK = 4,
    OTHER_TAGGED = 8,
    MIRRORED = 16,
    LIMITED = 32,

    FRAME_MAX = 9000,
    OTHER_SIZE = 64, /* of its ring */
    OTHER_BUFFER = 2048,
    OTHER_AVAIL = 0x1000,
    OTHER_USED = 0x2000,
    OTHER_BUFFERS = 0x3000,
    OTHER_MEMORY = OTHER_BUFFERS + OTHER_SIZE * OTHER_BUFFER,
};

static struct guest guest;
static struct vhost_switch *sw;
static struct switch_port *port[3]; /* the guest's, the other card's, the tap's */
static char *other;                 /* memory of the other guest */
static struct vhost_queue *other_queue;
static int wire[2];

static struct vhost_switch_port_settings settings_of(uint32_t flags, uint16_t vlan)
{
    return (struct vhost_switch_port_settings){
        .flags = flags, .stations = 8, .vlan = vlan, .mac = {2, 0, 0, 0, 0, 2}};
}

static void open_port(int i, struct vhost_device *device)
{
    port[i] = container_of(device, struct switch_port, device);
    CHECK_EQ(vhost_switch_plug(device, 1), 0);
    iothread_take_mail(&guest.thread);
    CHECK(port[i]->plugged);
}

/* A card whose driver is well behaved, and takes no offload. */
static void open_other(void)
{
    struct vhost_region *region;
    struct vhost_memory *memory;
    int fd = memfd_create("other", MFD_CLOEXEC);

    CHECK_EQ(ftruncate(fd, OTHER_MEMORY), 0);
    other = mmap(NULL, OTHER_MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(other != MAP_FAILED);
    CHECK_EQ(vhost_region_map(fd, 0, 0, OTHER_MEMORY, &region), 0);
    CHECK_EQ(vhost_memory_new(&region, 1, &memory), 0);
    vhost_region_unref(region);
    for (uint16_t i = 0; i < OTHER_SIZE; i++) {
        ((struct vring_desc *)(void *)other)[i] =
            (struct vring_desc){.addr = OTHER_BUFFERS + i * (uint64_t)OTHER_BUFFER,
                                .len = OTHER_BUFFER,
                                .flags = VRING_DESC_F_WRITE};
        ((uint16_t *)(void *)(other + OTHER_AVAIL))[2 + i] = i;
    }
    struct vhost_queue_config config = {.features = UINT64_C(1) << VIRTIO_F_VERSION_1,
                                        .avail = OTHER_AVAIL,
                                        .used = OTHER_USED,
                                        .size = OTHER_SIZE,
                                        .enabled = true,
                                        .kick_fd = -1,
                                        .call_fd = -1,
                                        .err_fd = -1};
    CHECK_EQ(vhost_queue_new(&config, &port[1]->device, memory, &other_queue), 0);
    vhost_memory_unref(memory);
    other_queue->thread = &guest.thread;
    other_queue->ops->service(other_queue);
}

/* What it got fits, and it has all its buffers again. */
static void other_takes(void)
{
    const uint16_t *used = (const uint16_t *)(const void *)(other + OTHER_USED);
    const struct vring_used_elem *elem = (const struct vring_used_elem *)(const void *)(used + 2);

    CHECK(!other_queue->broken);
    CHECK_EQ(other_queue->in_flight, 0);
    for (int i = 0; i < OTHER_SIZE; i++)
        CHECK(elem[i].len <= OTHER_BUFFER);
    ((uint16_t *)(void *)(other + OTHER_AVAIL))[1] = (uint16_t)(used[1] + OTHER_SIZE);
}

static void open_all(void)
{
    struct vhost_switch_config config = {.stations = 16, .age_s = 300};
    struct vhost_switch_port_settings settings = settings_of(0, 1);
    struct vhost_device *device;

    guest_open(&guest);
    guest.thread.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    CHECK_EQ(vhost_switch_new(&config, &guest.thread, &sw), 0);
    CHECK_EQ(vhost_switch_card_new(sw, 1, &settings, &guest.device), 0);
    open_port(0, guest.device);
    CHECK_EQ(vhost_switch_card_new(sw, 1, &settings, &device), 0);
    open_port(1, device);
    CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
    CHECK_EQ(vhost_switch_tap_new(sw, wire[0], &settings, &device), 0);
    open_port(2, device);
    open_other();
}

static void set_up(uint8_t how)
{
    static const uint32_t mirrored[3] = {VHOST_SWITCH_MIRRORED, VHOST_SWITCH_MIRROR, 0};

    sw->num_mirrors = how & MIRRORED ? 1 : 0;
    for (uint16_t i = 0; i < 3; i++) {
        stations_forget(&sw->stations, port[i]->id);
        port[i]->set = settings_of(how & MIRRORED ? mirrored[i] : 0, 1);
        port[i]->rate = port[i]->storm = (struct token_bucket){0};
    }
    if (how & TRUNK)
        memset(port[0]->set.trunk, 0xff, sizeof(port[0]->set.trunk));
    if (how & OTHER_TAGGED) {
        port[1]->set.vlan = 0;
        port[1]->set.trunk[0] = 2;
    }
    if (how & LIMITED)
        port[0]->set.rate = port[0]->set.burst = port[0]->set.storm = 100;
}

static void between(struct guest *g, int turn)
{
    static char frame[FRAME_MAX];

    other_takes();
    if (g->setup.queue % 2 == 0) {
        const uint16_t *word = (const uint16_t *)(const void *)g->host;
        size_t len = (size_t)(word[0x1800 / 2 + turn] % FRAME_MAX);
        memcpy(frame, g->host + 0x1000, len < MEMORY - 0x1000 ? len : MEMORY - 0x1000);
        g->queue->ops->service(g->queue); /* the switch knows it from then on */
        if (len)
            (void)!write(wire[1], frame, len);
        switch_tap_ready(&port[2]->tap);
    }
    while (read(wire[1], frame, sizeof(frame)) >= 0)
        ;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct setup setup;
    uint64_t features = 0;

    if (!sw)
        open_all();
    if (!guest_take(&data, &len, &setup))
        return 0;
    if (setup.device & MERGEABLE)
        features |= UINT64_C(1) << VIRTIO_NET_F_MRG_RXBUF;
    if (setup.device & OFFLOADS)
        features |= SWITCH_TAP_FEATURES | UINT64_C(1) << VIRTIO_NET_F_GUEST_TSO4;
    set_up(setup.device);
    guest_run(&guest, &setup, data, len, features, between);
    iothread_publish(&guest.thread);
    other_takes();
    return 0;
}
