/* What the ring layouts share: see chain.h. */
#include "chain.h"
#include <poll.h>
#include <string.h>

/* What lies at `addr`, and how many bytes of it are in one piece; NULL: nothing. */
static char *find(struct vhost_queue *q, uint64_t addr, bool write, uint64_t *room)
{
    if (q->memory->behind) {
        uint8_t access = write ? VHOST_ACCESS_WRITE : VHOST_ACCESS_READ;
        char *host = view_find(q->memory, addr, access, &q->memory_hint, room);
        if (!host) {
            q->lacks = access;
            q->lacks_addr = addr;
        }
        return host;
    }
    struct vhost_region *r = memory_find(q->memory, addr, &q->memory_hint);
    if (!r)
        return NULL;
    *room = r->size - (addr - r->guest_addr);
    return r->host + (addr - r->guest_addr);
}

cold_path enum vhost_fault chain_absent(const struct vhost_queue *q)
{
    return q->lacks ? CHAIN_LACKS : VHOST_FAULT_ADDRESS;
}

cold_path void chain_fail(struct vhost_queue *q, enum vhost_fault fault)
{
    if (fault == CHAIN_LACKS)
        queue_wait_for_view(q);
    else
        queue_break(q, fault);
}

cold_path int chain_add_split(struct vhost_queue *q, uint64_t addr, uint32_t len, uint32_t iovs,
                              bool write)
{
    uint64_t room;

    /* No memory ends there; a view would be asked for it again and again. */
    if (addr > UINT64_MAX - len)
        return -VHOST_FAULT_ADDRESS;
    for (;;) {
        char *host = find(q, addr, write, &room);
        if (!host)
            return -(int)chain_absent(q);
        if (iovs == q->iov_max)
            return -VHOST_FAULT_CHAIN_LENGTH;
        struct iovec *iov = &q->iov[iovs++];
        iov->iov_base = host;
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
    uint64_t room;

    if (addr > UINT64_MAX - len)
        return NULL;
    for (uint32_t done = 0; done < len;) {
        const char *host = find(q, addr + done, false, &room);
        if (!host)
            return NULL;
        if (done == 0 && len <= room)
            return host;
        if (len > q->chain_max * sizeof(struct vring_desc))
            return NULL;
        uint32_t part = room < len - done ? (uint32_t)room : len - done;
        memcpy((char *)q->table + done, host, part);
        done += part;
    }
    return q->table;
}

cold_path bool call_would_block(const struct vhost_queue *q)
{
    struct pollfd p = {.fd = q->call_fd, .events = POLLOUT};

    return poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT);
}
