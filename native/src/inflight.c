/*
 * In-flight tracking: which chains are popped and not yet completed, noted where it outlives us.
 *
 * A driver that is served by a killed process has chains that nobody works on any more, and the
 * ring does not tell which, since chains complete in any order.  So each is noted in memory that
 * the front-end shares with one server after another (vhost-user, "Inflight I/O tracking").  Each
 * layout of rings has its own format there (inflight_split.c, inflight_packed.c), and in both each
 * step is one store, a kill falls between two of them, and this is what they amount to:
 *
 *   pop      the chain is noted                        not marked: it is still to be popped
 *   show     the batch is noted, as one                nothing has happened yet
 *            the driver is shown the batch             it has it, whatever the marks say
 *            the marks are taken away
 *
 * The next server pops what is left once more, in the order of the counters, and then goes on
 * behind it in the ring.  It stays noted as it was, so a second kill finds the same.
 *
 * The region is the front-end's, and may say anything.  It is read at one time only, when a queue
 * is made: each field once, into memory of our own, and nothing is written or believed before all
 * was checked.  From then on it is only written.
 */
#include "inflight.h"
#include <errno.h>
#include <stdlib.h>

/* ---- regions ---- */

static const struct tracking *tracking_of(bool packed)
{
    return packed ? &track_packed : &track_split;
}

static uint64_t queue_bytes(uint32_t queue_size, bool packed)
{
    const struct tracking *k = tracking_of(packed);
    uint64_t size = k->header + (uint64_t)queue_size * k->entry;

    return (size + VHOST_USER_INFLIGHT_ALIGN - 1) & ~(uint64_t)(VHOST_USER_INFLIGHT_ALIGN - 1);
}

uint64_t vhost_inflight_size(uint32_t num_queues, uint32_t queue_size, bool packed)
{
    return num_queues * queue_bytes(queue_size, packed);
}

int vhost_inflight_map(int fd, uint64_t offset, uint32_t num_queues, uint32_t queue_size,
                       bool packed, struct vhost_inflight **out)
{
    if (queue_size == 0 || queue_size > VIRTQUEUE_MAX_SIZE || offset % sizeof(uint64_t))
        return -EINVAL;
    struct vhost_inflight *inflight = calloc(1, sizeof(*inflight));
    if (!inflight)
        return -ENOMEM;
    uint64_t size = vhost_inflight_size(num_queues, queue_size, packed);
    int err = vhost_region_map(fd, offset, 0, size, &inflight->region);
    if (err < 0) {
        free(inflight);
        return err;
    }
    atomic_init(&inflight->refs, 1);
    inflight->num_queues = num_queues;
    inflight->queue_size = queue_size;
    inflight->packed = packed;
    *out = inflight;
    return 0;
}

void vhost_inflight_unref(struct vhost_inflight *inflight)
{
    if (!inflight || atomic_fetch_sub(&inflight->refs, 1) != 1)
        return;
    vhost_region_unref(inflight->region);
    free(inflight);
}

bool inflight_is_broken(const struct tracker *t)
{
    return t && atomic_load(&t->region->region->broken);
}

bool queue_resumes(const struct vhost_queue *q)
{
    return q->tracker && q->tracker->num_again;
}

/* ---- a queue's part ---- */

static int by_counter(const void *a, const void *b)
{
    const struct noted *x = a, *y = b;

    return (x->counter > y->counter) - (x->counter < y->counter);
}

void inflight_sort(struct tracker *t, struct noted *noted)
{
    if (!t->num_again)
        return;
    qsort(noted, t->num_again, sizeof(*noted), by_counter);
    t->counter = noted[t->num_again - 1].counter + 1;
}

int inflight_open(struct vhost_queue *q, struct vhost_inflight *region)
{
    const struct tracking *k = tracking_of(region->packed);
    int err;

    if (!q->ops->tracked)
        return -EOPNOTSUPP;
    if (q->ring.packed != region->packed || q->ring.size > region->queue_size)
        return -EBADMSG;
    if (q->index >= region->num_queues)
        return 0;
    struct tracker *t = calloc(1, sizeof(*t));
    if (!t)
        return -ENOMEM;
    q->tracker = t; /* and so inflight_close will free it */
    atomic_fetch_add(&region->refs, 1);
    t->region = region;
    uint64_t at = q->index * queue_bytes(region->queue_size, region->packed);
    err = k->alloc(q, region->region->host + at);
    if (err < 0)
        return err;
    switch (k->version(t)) {
    case 0:
        k->begin(q);
        break;
    case VHOST_USER_INFLIGHT_VERSION:
        err = k->resume(q);
        break;
    default:
        err = -EBADMSG;
    }
    k->attach(q);
    /* What was read of a file that is not there any more is zeroes. */
    return inflight_is_broken(t) ? -ENODATA : err;
}

void inflight_close(struct vhost_queue *q)
{
    struct tracker *t = q->tracker;

    if (!t)
        return;
    tracking_of(t->region->packed)->free(t);
    vhost_inflight_unref(t->region);
    free(t);
}
