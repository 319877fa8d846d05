/*
 * What the parts of the packet generator know of each other; see net_driver.c for the theory.
 *
 *   net_driver_port.c    a port: the two rings of a queue pair, and the memory behind them
 *   net_driver_frames.c  frames out and in: stamps, patterns, what is in flight
 *   net_driver.c         a run: limits of time, waiting, the loop
 *
 * A port.  Each receive buffer has its descriptor for good; a buffer that came back is offered
 * again at once, and becomes the device's with the next publish.  Frames to be sent have slots,
 * laid out anew for each run since frames differ in size: virtio-net header, the port's own header,
 * and room for the stamp and what follows, all but the stamp written beforehand.
 *
 * Guest memory is the device's to write, so nothing that decides is read from it twice: which
 * buffers the device holds, which slots it holds, and in what order they were offered is kept
 * out of its reach.
 */
#ifndef VHOST_NET_DRIVER_H
#define VHOST_NET_DRIVER_H

#include "driver_ring.h"
#include "net.h"
#include <errno.h>

/* ---- net_driver_port.c ---- */

struct vhost_packet_port {
    struct driver_ring rx, tx;
    bool mergeable;
    bool broken; /* what the device holds is not known any more */

    char *rx_data;
    uint32_t rx_size;
    uint32_t rx_stride;
    bool *rx_held;       /* a buffer: by the device */
    uint16_t *rx_offers; /* what the avail ring was told */

    char *tx_data; /* the first slot's virtio-net header */
    uint32_t tx_stride;
    uint32_t tx_slots;
    uint32_t tx_idle_count;
    uint16_t *tx_idle; /* stack of slots */
    bool *tx_held;     /* a slot: by the device */

    char *tx_room; /* where slots can be */
    uint64_t tx_room_addr;
    uint64_t tx_room_size;

    uint32_t prefix_len; /* of what each frame sent starts with, virtio-net header included */
    char prefix[NET_HEADER_MAX + VHOST_PACKET_HEADER_MAX];
};

/* The device violated a ring: -EPROTO, from now on. */
int port_break(struct vhost_packet_port *p);
/* Lays out slots for frames of `size` bytes.  -EINVAL: there is room for none. */
int port_prepare(struct vhost_packet_port *p, uint32_t size);
/* Takes back the slots that the device is done with; how many, or -EPROTO. */
int port_reclaim(struct vhost_packet_port *p);
/* Makes the buffers that were offered the device's. */
void port_publish_rx(struct vhost_packet_port *p);

static inline char *port_buffer(const struct vhost_packet_port *p, uint32_t i)
{
    return p->rx_data + (size_t)i * p->rx_stride;
}

static inline char *port_slot(const struct vhost_packet_port *p, uint32_t i)
{
    return p->tx_data + (size_t)i * p->tx_stride;
}

/* Takes the next element of the used ring, which must be there, and offers its buffer again.
 * False: the device does not hold that buffer, or has written past it (virtio 1.3, 2.7.8). */
static inline bool port_take(struct vhost_packet_port *p, struct vring_used_elem *elem)
{
    *elem = driver_ring_elem(&p->rx, p->rx.used_idx);
    if (unlikely(elem->id >= p->rx.size || !p->rx_held[elem->id] || elem->len > p->rx_size))
        return false;
    p->rx_held[elem->id] = false;
    p->rx_offers[p->rx.avail_idx & (p->rx.size - 1)] = (uint16_t)elem->id;
    driver_ring_offer(&p->rx, (uint16_t)elem->id);
    driver_ring_next(&p->rx);
    return true;
}

/* A slot to fill, which must be there, on its way to the device. */
static inline char *port_send(struct vhost_packet_port *p)
{
    uint16_t i = p->tx_idle[--p->tx_idle_count];

    p->tx_held[i] = true;
    driver_ring_offer(&p->tx, i);
    return port_slot(p, i);
}

/* ---- net_driver_frames.c ---- */

enum { BATCH = 64 };

/* A port's part in a run. */
struct end {
    struct vhost_packet_port *port;
    uint64_t key_in, key_out; /* of the tags that belong here, and that are sent from here */
    uint32_t stamp_in;        /* where stamps are in what arrives, virtio-net header included */
    uint16_t rx_seen;         /* used index up to which there is nothing (more) to take */
    uint16_t tx_seen;         /* used index at the last tick */
    bool bounces;             /* sends back what arrives */
    uint64_t tx_moved_ns;     /* when its sending was last seen not to stall */
};

struct run {
    const struct vhost_packet_config *config;
    struct vhost_packet_result *result;
    struct end end[2]; /* the first sends */
    uint32_t ends;
    uint32_t frame_len; /* virtio-net header included */
    bool verify;
    bool sending;
    uint64_t packets;
    uint64_t start_ns, end_ns, tick_ns;
    uint64_t now, next_tick;
    uint64_t last_ns; /* when a frame was last sent or received */

    uint64_t *flight; /* times sent; 0 = nothing in flight here */
    uint32_t flight_mask;
    uint32_t sequence;
    uint64_t in_flight;

    uint64_t bucket_of; /* time sent whose latency is in `bucket`, for this batch */
    uint32_t bucket;
    char *flat; /* a frame that came in several buffers */
};

/* What tells the frames of this run from others. */
uint64_t frames_key(uint64_t seed, uint64_t time);
/* How many frames can be sent now. */
uint32_t frames_credit(const struct run *run);
/* Sends `n` frames, one batch. */
void frames_send(struct run *run, uint32_t n);
/* Takes a batch of what arrived.  How many buffers it took, or -EPROTO. */
int frames_receive(struct run *run, struct end *e);
/* Gives up what has been in flight for too long. */
void frames_expire(struct run *run);

/* Whether what arrives can be taken: where it is sent back, that needs a slot. */
static inline bool can_take(const struct end *e)
{
    return !e->bounces || e->port->tx_idle_count;
}

#endif
