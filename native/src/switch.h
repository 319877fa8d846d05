/*
 * The rooms of the switch:
 *
 *   switch.c          its life and that of its ports, and what the control thread asks for
 *   switch_in.c       frames from cards and taps, to where they go
 *   switch_out.c      ... into the buffers of a card, or to a tap
 *   switch_finish.c   checksums and segments that a driver left to the network card
 *   stations.c        which station is behind which port
 *
 * A frame crosses in one copy, from the buffers of the one guest into those of the other.  What a
 * decision rests upon (the virtio-net header, the Ethernet header) is copied first, and the copy is
 * what the receiver gets: a sender that changes its buffers meanwhile changes data, nothing else.
 */
#ifndef VHOST_SWITCH_INTERNAL_H
#define VHOST_SWITCH_INTERNAL_H

#include "net.h"
#include "stations.h"
#include <endian.h>
#include <string.h>

enum {
    ETH_HEADER = 14,
    VLAN_TAG = 4,
    ETHERTYPE_VLAN = 0x8100,
    VLAN_ID = 0xfff,
    HEAD_MAX = ETH_HEADER + VLAN_TAG,
    /* Pieces of a batch's frames; one of more pieces is made one piece. */
    ROW_PIECES = 512,
    FRAME_PIECES = 64,
    FLAT_MAX = NET_HEADER_MAX + NET_FRAME_MAX,
};

/* As if a tap had a driver: what it may be given, and what it may send. */
#define SWITCH_TAP_FEATURES                                                                        \
    (UINT64_C(1) << VIRTIO_F_VERSION_1 | UINT64_C(1) << VIRTIO_NET_F_CSUM |                        \
     UINT64_C(1) << VIRTIO_NET_F_GUEST_CSUM | UINT64_C(1) << VIRTIO_NET_F_HOST_TSO4 |              \
     UINT64_C(1) << VIRTIO_NET_F_HOST_TSO6 | UINT64_C(1) << VIRTIO_NET_F_HOST_ECN)

struct token_bucket {
    uint64_t level, filled_ns;
};

struct vhost_switch;

struct switch_port {
    struct vhost_device device;
    struct vhost_switch *sw;
    struct vhost_switch_port_settings set;
    uint64_t counter[VHOST_SWITCH_COUNTERS];
    struct token_bucket rate, storm;
    struct watch tap; /* fd -1: a card's port */
    uint16_t id;
    bool plugged; /* the iothread's own, as all above but the device */
    uint32_t num_pairs;
    struct vhost_queue *rx[]; /* the running receive queues, by pair */
};

/* A queue's state. */
struct switch_queue {
    uint32_t header_len;
    uint32_t credit; /* of a receive queue: chains that may be popped without another look */
    bool mergeable;
};

/* A frame on its way.  `mac`, `tag` and `type` stand for its first `stripped` bytes. */
struct frame {
    struct virtio_net_hdr vnet; /* checked; in host byte order */
    uint32_t len;               /* bytes, as it came */
    uint16_t vlan;
    uint16_t priority; /* of a tag: all bits but the VLAN's */
    uint16_t stripped;
    uint8_t mac[12]; /* to, from */
    uint8_t type[2];
    uint16_t pair;
    struct switch_port *to;  /* where it goes, or NULL: everywhere */
    const struct iovec *iov; /* the pieces behind those bytes, ... */
    uint32_t iovs;
    uint32_t skip; /* ... without so many bytes of the first */
};

struct vhost_switch {
    struct vhost_iothread *thread;
    struct stations stations;
    uint32_t now_s;
    struct switch_port *port[VHOST_SWITCH_PORTS]; /* by number; NULL: not plugged in */
    uint16_t plugged[VHOST_SWITCH_PORTS];         /* numbers of the plugged ones */
    uint32_t num_plugged;
    uint32_t num_mirrors;
    bool taken[VHOST_SWITCH_PORTS]; /* numbers in use: the control thread's own */
    uint32_t num_taken;

    struct frame frame[NET_BATCH];
    struct iovec row[ROW_PIECES];
    char flat[FLAT_MAX];
    char whole[FLAT_MAX]; /* switch_finish.c's */
    char segment[FLAT_MAX];
};

static inline struct switch_port *port_of(const struct vhost_queue *q)
{
    return container_of(q->device, struct switch_port, device);
}

static inline void port_count(struct switch_port *p, enum vhost_switch_counter c, uint64_t n)
{
    /* One writer, as in `count`. */
    __atomic_store_n(&p->counter[c], __atomic_load_n(&p->counter[c], __ATOMIC_RELAXED) + n,
                     __ATOMIC_RELAXED);
}

static inline bool port_is(const struct switch_port *p, enum vhost_switch_port_flag flag)
{
    return p->set.flags & flag;
}

static inline bool port_tags(const struct switch_port *p, uint16_t vlan)
{
    return has_bit(p->set.trunk[vlan / 64], vlan % 64);
}

static inline bool port_is_in(const struct switch_port *p, uint16_t vlan)
{
    return p->set.vlan == vlan || port_tags(p, vlan);
}

/* Of the address that ends a run of 8 bytes that may be read. */
static inline station_key key_of(uint16_t vlan, const uint8_t end[8])
{
    uint64_t bytes;

    memcpy(&bytes, end, sizeof(bytes));
    return (be64toh(bytes) & UINT64_C(0xffffffffffff)) | (station_key)vlan << 48;
}

static inline station_key source_of(const struct frame *f)
{
    return key_of(f->vlan, f->mac + 4);
}

static inline station_key target_of(const struct frame *f)
{
    uint64_t bytes;

    memcpy(&bytes, f->mac, sizeof(bytes));
    return be64toh(bytes) >> 16 | (station_key)f->vlan << 48;
}

static inline bool is_group(const uint8_t mac[6])
{
    return mac[0] & 1;
}

/* switch_in.c */
bool switch_tx_service(struct vhost_queue *q);
void switch_tap_ready(struct watch *watch);
void switch_announce(struct switch_port *from, const uint8_t mac[6]);

/* switch_out.c: sends a frame out of a port that is to have it. */
void switch_put(struct switch_port *to, const struct frame *f);
/* The same with frames of one queue pair, up to NET_BATCH. */
void switch_put_many(struct switch_port *to, const struct frame *frame, uint32_t n);
/* Puts what switch_finish made of a frame. */
void switch_put_finished(struct switch_port *to, struct vhost_queue *q, const struct frame *f);

/* switch_finish.c: what this driver cannot do with a frame is done here. */
void switch_finish(struct switch_port *to, struct vhost_queue *q, const struct frame *f);

#endif
