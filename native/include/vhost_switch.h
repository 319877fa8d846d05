/*
 * The virtual switch: frames between cards, and between cards and a tap.
 *
 * A switch belongs to one iothread, on which all queues of its ports must run.  A port is a device
 * like any other: a card's port serves the queue pairs of a virtio-net device; a tap's port has no
 * queues.  Conventions as in libvhost.h; functions with a `token` post a message to the iothread.
 */
#ifndef VHOST_SWITCH_H
#define VHOST_SWITCH_H

#include <libvhost.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef begin */

enum vhost_switch_limit {
    VHOST_SWITCH_PORTS = 256,
    VHOST_SWITCH_STATIONS = 1048576, /* in a table, at most */
    VHOST_SWITCH_VLANS = 4096,       /* 1 to 4094 are VLANs (IEEE 802.1Q, table 9-2) */
};

struct vhost_switch;

struct vhost_switch_config {
    uint32_t stations; /* room of the table; rounded up to a power of two */
    uint32_t age_s;    /* a station that was not heard of for so long is forgotten */
};

int vhost_switch_new(const struct vhost_switch_config *config, struct vhost_iothread *thread,
                     struct vhost_switch **out);
/* -EBUSY while it has ports. */
int vhost_switch_free(struct vhost_switch *sw);

enum vhost_switch_port_flag {
    VHOST_SWITCH_BOUND = 1,   /* only `mac` may send here, and it nowhere else */
    VHOST_SWITCH_PRIVATE = 2, /* reaches uplinks alone, and is reached from them alone */
    VHOST_SWITCH_UPLINK = 4,
    VHOST_SWITCH_DOWN = 8,    /* the cable is pulled */
    VHOST_SWITCH_MIRROR = 16, /* gets a copy of what crosses ports of `mirrored`, and nothing else;
                                 what it sends is dropped */
    VHOST_SWITCH_MIRRORED = 32,
};

struct vhost_switch_port_settings {
    uint32_t flags;
    uint32_t stations;                       /* learned here, at most */
    uint8_t mac[6];                          /* of BOUND */
    uint16_t vlan;                           /* of untagged frames, both ways; 0: there are none */
    uint64_t trunk[VHOST_SWITCH_VLANS / 64]; /* VLANs whose frames are tagged here */
    uint64_t rate;                           /* bytes a second that it may send, 0 = any number */
    uint64_t burst;                          /* bytes, beyond that, after a silence */
    uint64_t storm; /* frames a second that it may send to more than one port, 0 = any number */
};

/* What a switch counts of a port.  "In" is from the port into the switch. */
enum vhost_switch_counter {
    VHOST_SWITCH_IN_FRAMES = 0,
    VHOST_SWITCH_IN_BYTES = 1,
    VHOST_SWITCH_OUT_FRAMES = 2,
    VHOST_SWITCH_OUT_BYTES = 3,
    VHOST_SWITCH_FLOODED = 4,   /* in, and out on more than one port */
    VHOST_SWITCH_UNLEARNED = 5, /* in, from a station for which there was no room */
    VHOST_SWITCH_FINISHED = 6,  /* out, checksummed or cut here, since the driver cannot */
    /* Of frames in: */
    VHOST_SWITCH_DROP_SHORT = 8, /* no whole Ethernet header */
    VHOST_SWITCH_DROP_LONG = 9,  /* longer than any frame is */
    VHOST_SWITCH_DROP_BAD_HEADER =
        10, /* a virtio-net header that cannot be, or was not agreed on */
    VHOST_SWITCH_DROP_BAD_SOURCE = 11, /* a group's address, or 0 */
    VHOST_SWITCH_DROP_SPOOFED = 12,    /* a source that is bound to another port, or not to this */
    VHOST_SWITCH_DROP_VLAN = 13,       /* of a VLAN that the port is not in */
    VHOST_SWITCH_DROP_FILTERED = 14,   /* to its own port, to bridges, or between private ports */
    VHOST_SWITCH_DROP_RATE = 15,
    VHOST_SWITCH_DROP_STORM = 16,
    VHOST_SWITCH_DROP_DOWN = 17, /* the port is down, disabled, or a mirror's */
    /* Of frames out: */
    VHOST_SWITCH_DROP_NO_DRIVER = 20,  /* no receive queue runs */
    VHOST_SWITCH_DROP_NO_BUFFER = 21,  /* of the driver's; or the tap's queue was full */
    VHOST_SWITCH_DROP_NO_ROOM = 22,    /* longer than the driver's buffers */
    VHOST_SWITCH_DROP_UNFINISHED = 23, /* the driver cannot finish it, and it is no TCP to cut */
    VHOST_SWITCH_COUNTERS = 24,
};

/* The port of a card with so many queue pairs; queue 2k is received on, 2k + 1 sent on.
 * -EINVAL: pairs, or what vhost_switch_set says; -ENOSPC: the switch has all ports it can. */
int vhost_switch_card_new(struct vhost_switch *sw, uint32_t num_pairs,
                          const struct vhost_switch_port_settings *settings,
                          struct vhost_device **out);
/* The port of a tap's first queue: IFF_VNET_HDR, its header 12 bytes and little endian. */
int vhost_switch_tap_new(struct vhost_switch *sw, int tap_fd,
                         const struct vhost_switch_port_settings *settings,
                         struct vhost_device **out);
/* Frames go there and come from there from the answer on.  -EBUSY: it is plugged in. */
int vhost_switch_plug(struct vhost_device *port, uint64_t token);
/* The other way round, and its stations are forgotten: it may be freed.  The switch is left by
 * vhost_device_free, when no queue of the port runs. */
int vhost_switch_unplug(struct vhost_device *port, uint64_t token);
/* -EINVAL: a VLAN out of range, or a bound address of a group. Stations of the port whose VLAN it
 * left are forgotten. */
int vhost_switch_set(struct vhost_device *port, const struct vhost_switch_port_settings *settings,
                     uint64_t token);
/* Says in the network, by a RARP request as from this port, that `mac` is reached here now. */
int vhost_switch_announce(struct vhost_device *port, const uint8_t *mac, uint64_t token);
/* The number that stations have it by. */
uint32_t vhost_switch_port_number(const struct vhost_device *port);
void vhost_switch_read_counters(const struct vhost_device *port, uint64_t *out);

struct vhost_switch_station {
    uint8_t mac[6];
    uint16_t vlan;
    uint32_t port; /* vhost_switch_port_number */
    uint32_t age_s;
    bool bound;
};

/* Writes up to `max` stations to `out`, which stays the message's until it is answered; value =
 * how many. */
int vhost_switch_read_stations(struct vhost_switch *sw, struct vhost_switch_station *out,
                               uint32_t max, uint64_t token);

/* cdef end */

#ifdef __cplusplus
}
#endif
#endif
