/*
 * The net device: queue pairs, each with one queue of a tap.
 *
 * Queue 2k receives (tap to guest, net_rx.c), queue 2k+1 transmits (guest to tap, net_tx.c); both
 * use tap fd k.  The tap speaks the virtio-net header itself (IFF_VNET_HDR), at the length and
 * byte order that the driver negotiated, so a frame crosses with its header in one system call
 * between guest memory and the kernel, and no byte of it is copied or looked at here.  That is
 * also the defence against hostile headers: the kernel copies the header once and checks that.
 *
 * Frames are dropped, by name, where a network card would drop them; nothing here waits for the
 * network.  A ring is the guest's, so whatever it holds is completed exactly once, with length 0
 * where it was of no use.
 */
#include "net.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

static inline bool receives(const struct vhost_queue *q)
{
    return q->index % 2 == 0;
}

static int queue_open(struct vhost_queue *q)
{
    struct net_device *net = container_of(q->device, struct net_device, device);
    int tap = net->tap[q->index / 2];

    return receives(q) ? net_rx_open(q, tap) : net_tx_open(q, tap);
}

static void queue_close(struct vhost_queue *q)
{
    if (receives(q)) {
        net_rx_close(q);
    } else {
        net_tx_close(q);
    }
}

static void detach(struct vhost_queue *q)
{
    if (receives(q))
        net_rx_detach(q);
}

static bool service(struct vhost_queue *q)
{
    return receives(q) ? net_rx_service(q) : net_tx_service(q);
}

static void quiesce(struct vhost_queue *q)
{
    if (receives(q))
        net_rx_quiesce(q);
}

static void net_free(struct vhost_device *device)
{
    struct net_device *net = container_of(device, struct net_device, device);

    for (uint32_t i = 0; i < net->num_pairs; i++)
        close(net->tap[i]);
    free(net);
}

static const struct device_ops net_ops = {
    .queue_open = queue_open,
    .queue_close = queue_close,
    .detach = detach,
    .service = service,
    .quiesce = quiesce,
    .free = net_free,
    .in_order = true,
    .chain_max = UIO_MAXIOV,
};

/* A tap fd of our own.  O_NONBLOCK belongs to the open file, so the caller's has it too. */
static int tap_dup(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return copy < 0 ? -errno : copy;
}

int vhost_net_new(const struct vhost_net_config *config, struct vhost_device **out)
{
    uint32_t n = config->num_pairs;

    if (n == 0 || 2 * (uint64_t)n > VHOST_USER_VRING_INDEX_MASK + 1)
        return -EINVAL;
    struct net_device *net = calloc(1, sizeof(*net) + n * sizeof(net->tap[0]));
    if (!net)
        return -ENOMEM;
    int err = device_init(&net->device, &net_ops, 2 * n);
    if (err < 0) {
        free(net);
        return err;
    }
    for (net->num_pairs = 0; net->num_pairs < n; net->num_pairs++) {
        int tap = tap_dup(config->tap_fds[net->num_pairs]);
        if (tap < 0) {
            vhost_device_free(&net->device);
            return tap;
        }
        net->tap[net->num_pairs] = tap;
    }
    *out = &net->device;
    return 0;
}
