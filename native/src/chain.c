/* What the ring layouts share: see chain.h. */
#include "chain.h"
#include <poll.h>
#include <string.h>

cold_path int chain_add_split(struct vhost_queue *q, uint64_t addr, uint32_t len, uint32_t iovs)
{
    for (;;) {
        struct vhost_region *r = memory_find(q->memory, addr, &q->memory_hint);
        if (!r)
            return -VHOST_FAULT_ADDRESS;
        uint64_t offset = addr - r->guest_addr;
        uint64_t room = r->size - offset;
        if (iovs == q->iov_max)
            return -VHOST_FAULT_CHAIN_LENGTH;
        struct iovec *iov = &q->iov[iovs++];
        iov->iov_base = r->host + offset;
        if (len <= room) {
            iov->iov_len = len;
            return (int)iovs;
        }
        iov->iov_len = room;
        addr += room;
        len -= (uint32_t)room;
    }
}

cold_path const void *chain_copy_table(struct vhost_queue *q, uint64_t addr, uint32_t len)
{
    if (len > q->chain_max * sizeof(struct vring_desc))
        return NULL;
    for (uint32_t done = 0; done < len;) {
        struct vhost_region *r = memory_find(q->memory, addr + done, &q->memory_hint);
        if (!r)
            return NULL;
        uint64_t offset = addr + done - r->guest_addr;
        uint64_t part = r->size - offset < len - done ? r->size - offset : len - done;
        memcpy((char *)q->table + done, r->host + offset, part);
        done += (uint32_t)part;
    }
    return q->table;
}

cold_path bool call_would_block(const struct vhost_queue *q)
{
    struct pollfd p = {.fd = q->call_fd, .events = POLLOUT};

    return poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT);
}
