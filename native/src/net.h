/* What the parts of the net device know of each other; see net.c for the theory. */
#ifndef VHOST_NET_H
#define VHOST_NET_H

#include "internal.h"

enum {
    /* The longest frame: an IPv6 packet of 40 + 65535 bytes behind an Ethernet and a VLAN header.
     * Segmentation offload makes frames of this size whatever the MTU is. */
    NET_FRAME_MAX = 65535 + 40 + 14 + 4,
    NET_HEADER_MAX = sizeof(struct virtio_net_hdr),
    /* Frames a queue moves in one pass, so that a flood on one leaves the others their turn. */
    NET_BATCH = 64,
};

struct net_device {
    struct vhost_device device;
    uint32_t num_pairs;
    int tap[]; /* one a queue pair */
};

/* virtio 1.3, section 5.1.6.1: num_buffers is there from VERSION_1 or MRG_RXBUF on. */
static inline uint32_t net_header_len(uint64_t features)
{
    return has_bit(features, VIRTIO_F_VERSION_1) || has_bit(features, VIRTIO_NET_F_MRG_RXBUF)
               ? sizeof(struct virtio_net_hdr)
               : offsetof(struct virtio_net_hdr, num_buffers);
}

/* net_tx.c: guest to tap.  All as in struct device_ops. */
int net_tx_open(struct vhost_queue *q, int tap);
void net_tx_close(struct vhost_queue *q);
bool net_tx_service(struct vhost_queue *q);

/* net_rx.c: tap to guest. */
int net_rx_open(struct vhost_queue *q, int tap);
void net_rx_close(struct vhost_queue *q);
void net_rx_detach(struct vhost_queue *q);
bool net_rx_service(struct vhost_queue *q);
void net_rx_quiesce(struct vhost_queue *q);

#endif
