/* A port of the packet generator; see net_driver.h for the theory. */
#include "net_driver.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LINE = 64, FILLER = 0x5a };

_Static_assert((int)VHOST_PACKET_MAX == (int)NET_FRAME_MAX, "the longest frame is declared twice");

/* Strides of an odd number of cache lines: powers of two would put the first lines of all
 * buffers into a few sets of the cache. */
static uint32_t stride_of(uint32_t size)
{
    return ((size + LINE - 1) / LINE | 1) * LINE;
}

static int ring_open(struct driver_ring *r, const struct vhost_packet_ring *config,
                     const struct driver_memory *memory, uint32_t flags)
{
    unsigned kind = (flags & VHOST_PACKET_PACKED ? DRIVER_RING_PACKED : 0) |
                    (flags & VHOST_PACKET_IN_ORDER ? DRIVER_RING_IN_ORDER : 0);

    r->event_idx = flags & VHOST_PACKET_EVENT_IDX;
    r->kick_fd = r->call_fd = -1;
    int err = driver_ring_open(r, memory, config->desc, config->avail, config->used, config->size,
                               1, kind);
    if (!err && config->kick_fd >= 0) {
        r->kick_fd = fcntl(config->kick_fd, F_DUPFD_CLOEXEC, 0);
        err = r->kick_fd < 0 ? -errno : 0;
    }
    if (!err && config->call_fd >= 0) {
        r->call_fd = fcntl(config->call_fd, F_DUPFD_CLOEXEC, 0);
        err = r->call_fd < 0 ? -errno : 0;
    }
    return err;
}

static void ring_close(struct driver_ring *r)
{
    driver_ring_close(r);
    if (r->kick_fd >= 0)
        close(r->kick_fd);
    if (r->call_fd >= 0)
        close(r->call_fd);
}

/* Receive buffers first, then the room for slots. */
static int lay_out(struct vhost_packet_port *p, const struct vhost_packet_port_config *c,
                   const struct driver_memory *memory)
{
    uint64_t rx_room = (uint64_t)p->rx.size * p->rx_stride;

    p->rx_data = driver_memory_at(memory, c->buffers, c->buffers_size);
    if (!p->rx_data || c->buffers_size < rx_room)
        return -EINVAL;
    p->tx_room = p->rx_data + rx_room;
    p->tx_room_addr = c->buffers + rx_room;
    p->tx_room_size = c->buffers_size - rx_room;

    p->rx_held = calloc(p->rx.size, sizeof(*p->rx_held));
    p->rx_offers = calloc(p->rx.size, sizeof(*p->rx_offers));
    p->tx_held = calloc(p->tx.size, sizeof(*p->tx_held));
    p->tx_idle = calloc(p->tx.size, sizeof(*p->tx_idle));
    if (!p->rx_held || !p->rx_offers || !p->tx_held || !p->tx_idle)
        return -ENOMEM;
    memset(p->rx_data, FILLER, rx_room); /* pages are faulted in here, not while measuring */
    for (uint32_t i = 0; i < p->rx.size; i++) {
        p->rx.desc[i] = (struct vring_desc){.addr = c->buffers + (uint64_t)i * p->rx_stride,
                                            .len = p->rx_size,
                                            .flags = VRING_DESC_F_WRITE};
        p->rx_offers[p->rx.avail_idx & (p->rx.size - 1)] = (uint16_t)i;
        driver_ring_offer(&p->rx, (uint16_t)i);
    }
    return 0;
}

int vhost_packet_port_new(const struct vhost_packet_port_config *c, struct vhost_packet_port **out)
{
    const uint32_t flags = VHOST_PACKET_EVENT_IDX | VHOST_PACKET_MERGEABLE | VHOST_PACKET_PACKED |
                           VHOST_PACKET_IN_ORDER;
    struct driver_memory memory = {c->memory, c->memory_size, c->guest_addr};
    struct vhost_packet_port *p;
    int err;

    if (c->flags & ~flags || c->header_len > VHOST_PACKET_HEADER_MAX ||
        (c->header_len && !c->header) || c->rx_buffer_size < NET_HEADER_MAX + VHOST_PACKET_MIN ||
        c->rx_buffer_size > NET_HEADER_MAX + VHOST_PACKET_MAX || c->buffers % LINE)
        return -EINVAL;
    p = calloc(1, sizeof(*p));
    if (!p)
        return -ENOMEM;
    p->mergeable = c->flags & VHOST_PACKET_MERGEABLE;
    p->rx_size = c->rx_buffer_size;
    p->rx_stride = stride_of(p->rx_size);
    p->prefix_len = NET_HEADER_MAX + c->header_len;
    memcpy(p->prefix, &c->vnet, NET_HEADER_MAX);
    /* The driver sets num_buffers to 0 in what it sends (virtio 1.3, section 5.1.6.2.1). */
    memset(p->prefix + offsetof(struct virtio_net_hdr, num_buffers), 0, sizeof(uint16_t));
    if (c->header_len)
        memcpy(p->prefix + NET_HEADER_MAX, c->header, c->header_len);
    p->tx.kick_fd = p->tx.call_fd = -1;
    err = ring_open(&p->rx, &c->rx, &memory, c->flags);
    if (!err)
        err = ring_open(&p->tx, &c->tx, &memory, c->flags);
    if (!err)
        err = lay_out(p, c, &memory);
    if (err) {
        vhost_packet_port_free(p);
        return err;
    }
    *out = p;
    return 0;
}

void vhost_packet_port_free(struct vhost_packet_port *p)
{
    if (!p)
        return;
    ring_close(&p->rx);
    ring_close(&p->tx);
    free(p->rx_held);
    free(p->rx_offers);
    free(p->tx_held);
    free(p->tx_idle);
    free(p);
}

int port_break(struct vhost_packet_port *p)
{
    p->broken = true;
    return -EPROTO;
}

int port_prepare(struct vhost_packet_port *p, uint32_t size)
{
    /* Stamps begin cache lines: then all lines before them stay as they are from run to run, and
     * clean in both CPUs' caches. */
    uint32_t shift = -p->prefix_len & (LINE - 1);
    uint32_t stride = stride_of(shift + NET_HEADER_MAX + size);
    uint64_t slots = p->tx_room_size / stride;

    p->tx_slots = slots < p->tx.size ? (uint32_t)slots : p->tx.size;
    p->tx_stride = stride;
    p->tx_data = p->tx_room + shift;
    p->tx_idle_count = 0;
    for (uint32_t i = p->tx_slots; i--;) {
        char *slot = port_slot(p, i);
        memcpy(slot, p->prefix, p->prefix_len);
        memset(slot + p->prefix_len, FILLER, NET_HEADER_MAX + size - p->prefix_len);
        p->tx.desc[i] = (struct vring_desc){.addr = p->tx_room_addr + (uint64_t)(slot - p->tx_room),
                                            .len = NET_HEADER_MAX + size};
        p->tx_idle[p->tx_idle_count++] = (uint16_t)i;
    }
    return p->tx_slots ? 0 : -EINVAL;
}

int port_reclaim(struct vhost_packet_port *p)
{
    uint16_t n = driver_ring_pending(&p->tx);

    if (n > driver_ring_in_flight(&p->tx))
        return port_break(p);
    for (uint16_t i = 0; i < n; i++) {
        uint32_t id = driver_ring_elem(&p->tx, p->tx.used_idx).id;
        driver_ring_next(&p->tx);
        if (id >= p->tx_slots || !p->tx_held[id])
            return port_break(p);
        p->tx_held[id] = false;
        p->tx_idle[p->tx_idle_count++] = (uint16_t)id;
    }
    return n;
}

void port_publish_rx(struct vhost_packet_port *p)
{
    if (p->rx.published == p->rx.avail_idx)
        return;
    for (uint16_t i = p->rx.published; i != p->rx.avail_idx; i++)
        p->rx_held[p->rx_offers[i & (p->rx.size - 1)]] = true;
    driver_ring_publish(&p->rx);
}
