/*
 * The block device's rooms.
 *
 *   blk.c         the device; a chain becomes a checked request; a result becomes a status
 *   blk_io.c      data: at once from the page cache, by io_uring, or by a worker
 *   blk_worker.c  a pool of threads for what can wait: ranges, bounce buffers, no io_uring
 */
#ifndef VHOST_BLK_H
#define VHOST_BLK_H

#include "internal.h"

enum { BLK_INLINE_IOVS = 6 };

struct blk_worker_pool;

struct blk {
    struct vhost_device device;
    int fd;
    uint32_t flags;
    uint32_t seg_max, max_discard_seg, max_discard_sectors;
    _Atomic uint64_t capacity; /* sectors */
    atomic_bool writeback;
    bool memory_backed; /* tmpfs: plain reads and writes never wait for a disk */
    bool direct;        /* O_DIRECT: no page cache to ask first */
    uint32_t dma_align; /* of buffers, under O_DIRECT */
    uint8_t id[VIRTIO_BLK_ID_BYTES];
    struct blk_worker_pool *pool;
};

/* A request, parsed and checked.  Its iovecs point into guest memory. */
struct blk_request {
    struct io_op op;
    struct vhost_queue *queue;
    struct iovec *iov; /* data only: no header, no status */
    uint32_t iov_count, iov_room;
    uint32_t type;
    uint64_t offset; /* bytes */
    uint32_t len;    /* data bytes */
    uint32_t done;   /* of them, after short transfers */
    uint64_t start_ns;
    uint8_t *status;
    uint32_t used_len; /* bytes written to the guest if all goes well, status included */
    uint16_t head;
    uint16_t num_ranges;
    struct virtio_blk_range *ranges;
    struct iovec inline_iov[BLK_INLINE_IOVS];
};

struct blk_queue {
    uint32_t nowait_skip;    /* page-cache attempts still to be left out after misses */
    uint32_t nowait_penalty; /* how many to leave out after the next miss */
    struct blk_request request[];
};

static inline struct blk *blk_of(const struct vhost_queue *q)
{
    return container_of(q->device, struct blk, device);
}

/* The outcome of blk_io_start. */
enum blk_outcome { BLK_EXECUTED, BLK_SUBMITTED };

/* Starts a request; for BLK_EXECUTED *result is 0 or a negative errno. */
enum blk_outcome blk_io_start(struct blk *blk, struct blk_request *r, int32_t *result);
/* What a null image does: reads give zeroes, writes vanish. */
void blk_io_null(struct blk_request *r);
/* Has the queue's requests with io_uring end undone, those that have not begun. */
void blk_io_recall(struct vhost_queue *q);
/* Whether the buffers will do for O_DIRECT. */
bool blk_io_aligned(const struct blk *blk, const struct blk_request *r);
/* Ends a request: status, used ring, counters.  `result` is 0 or a negative errno. */
void blk_request_finish(struct blk_request *r, int32_t result, uint64_t now);

/* blk_worker.c */
int blk_worker_pool_new(struct blk *blk, struct blk_worker_pool **out);
void blk_worker_pool_free(struct blk_worker_pool *pool);
/* Hands the request to a worker; its op completes on the queue's iothread. */
void blk_worker_submit(struct blk_worker_pool *pool, struct blk_request *r);
/* Has the queue's requests that no worker has taken end undone; on the queue's iothread. */
void blk_worker_recall(struct blk_worker_pool *pool, struct vhost_queue *q);

#endif
