/* A disk's queue is suspended: what has not begun stays noted, and the next queue does it. */
#include "disk.h"

enum { CHAINS = 20, LEN = 4096, ROUNDS = 20, STATUSES = 0x800 };

static uint32_t chain_flags(const struct vhost_user_inflight_split *shared)
{
    const struct vhost_user_inflight_chain *chain = (const void *)(shared + 1);
    uint32_t n = 0;

    for (uint32_t i = 0; i < shared->desc_num; i++)
        n += __atomic_load_n(&chain[i].inflight, __ATOMIC_ACQUIRE);
    return n;
}

static void offer(struct disk *d, unsigned char byte)
{
    struct driver_ring *r = &d->ring;
    struct virtio_blk_req_hdr *header = buffer_at(r, HEADER);

    memset(buffer_at(r, STATUSES), 0xee, CHAINS);
    for (uint16_t i = 0; i < CHAINS; i++) {
        bool flush = i & 1;
        uint16_t at = 3 * i;
        header[i] = (struct virtio_blk_req_hdr){
            .type = flush ? VIRTIO_BLK_T_FLUSH : VIRTIO_BLK_T_OUT,
            .sector = flush ? 0 : i * (LEN / SECTOR),
        };
        memset((char *)buffer_at(r, DATA) + i * LEN, byte, LEN);
        set_desc(r->desc, at, buffer_addr(r, HEADER + i * sizeof(*header)), sizeof(*header),
                 VRING_DESC_F_NEXT, flush ? at + 2 : at + 1);
        set_desc(r->desc, at + 1, buffer_addr(r, DATA + i * LEN), LEN, VRING_DESC_F_NEXT, at + 2);
        set_desc(r->desc, at + 2, buffer_addr(r, STATUSES + i), 1, VRING_DESC_F_WRITE, 0);
        driver_offer(r, at);
    }
    driver_publish(r);
    driver_kick(r);
}

static void replace(struct disk *d, struct vhost_inflight *region, uint32_t base)
{
    struct vhost_queue_config config = driver_config(&d->ring, 0);

    CHECK_EQ(vhost_queue_free(d->queue), 0);
    config.inflight = region;
    config.next_index = base;
    CHECK_EQ(vhost_queue_new(&config, d->device, d->guest.memory, &d->queue), 0);
    queue_run(&d->control, d->queue);
}

static void expect_each_once(struct disk *d, unsigned char byte)
{
    uint64_t seen = 0;

    for (int i = 0; i < CHAINS; i++) {
        uint64_t bit = UINT64_C(1) << driver_take(&d->ring).id;
        CHECK_EQ(seen & bit, 0);
        seen |= bit;
    }
    CHECK(all_bytes_are(buffer_at(&d->ring, STATUSES), VIRTIO_BLK_S_OK, CHAINS));
    for (uint16_t i = 0; i < CHAINS; i += 2)
        CHECK(image_is(d, i * (LEN / SECTOR), byte, LEN));
}

static uint16_t suspend(struct disk *d)
{
    CHECK_EQ(vhost_queue_suspend(d->queue, ++d->control.token), 0);
    struct vhost_event e = await_done(&d->control);
    CHECK_EQ(e.result, 0);
    return (uint16_t)e.value;
}

static void again_and_again(struct disk *d)
{
    uint64_t size = vhost_inflight_size(1, d->ring.size, false);
    int fd = memfd_create("inflight", MFD_CLOEXEC);
    struct vhost_inflight *region;
    uint32_t left = 0;

    CHECK_EQ(ftruncate(fd, (off_t)size), 0);
    CHECK_EQ(vhost_inflight_map(fd, 0, 1, d->ring.size, false, &region), 0);
    struct vhost_user_inflight_split *shared = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(shared != MAP_FAILED);
    replace(d, region, queue_halt(&d->control, d->queue));
    for (uint16_t round = 0; round < ROUNDS; round++) {
        offer(d, (unsigned char)round);
        if (round & 1)
            driver_await_used(&d->ring, 1);
        uint16_t base = suspend(d);
        uint16_t popped = (uint16_t)(base - round * CHAINS);
        uint16_t used = (uint16_t)(driver_used_idx(&d->ring) - round * CHAINS);
        CHECK(popped <= CHAINS);
        CHECK_EQ(chain_flags(shared), (uint32_t)(popped - used));
        left += popped - used;
        replace(d, region, base);
        expect_each_once(d, (unsigned char)round);
    }
    printf("# %u left\n", left);
    munmap(shared, size);
    vhost_inflight_unref(region);
    close(fd);
}

static void what_is_left_is_done_by_the_next(void)
{
    on_every_disk(again_and_again);
}

/* Without a place to note it, all is done first. */
static void nothing_is_left_without_a_region(void)
{
    struct disk d;

    disk_open(&d, &disk_kinds[3]);
    offer(&d, 1);
    driver_await_used(&d.ring, 1);
    uint16_t base = suspend(&d);
    CHECK_EQ(driver_used_idx(&d.ring), base);
    replace(&d, NULL, base);
    expect_each_once(&d, 1);
    disk_close(&d);
}

static const struct test tests[] = {
    TEST(what_is_left_is_done_by_the_next),
    TEST(nothing_is_left_without_a_region),
};
MAIN(tests)
