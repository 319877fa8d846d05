/*
 * Catalogue, control plane 35, of packed rings: what a front-end may have written into an in-flight
 * region, and what a driver may do to what is noted there.
 */
#define PACKED_RINGS
#include "rig.h"

enum { SIZE = 8, REGION_QUEUE = SIZE + 1, NONE = REGION_QUEUE, MADE_AT = WRAP + 3 };

/* An earlier server, forged: two chains are in flight, of the entries 2, 5 and 6, and of 1. */
struct left {
    struct rig rig; /* its queue is made by `revive` */
    int fd;
    struct vhost_inflight *region;
    struct vhost_user_inflight_packed *shared;
    struct vhost_user_inflight_desc *desc;
};

static uint64_t region_size(void)
{
    return vhost_inflight_size(1, REGION_QUEUE, true);
}

static struct left left_open(void)
{
    static const uint16_t next[REGION_QUEUE] = {3, 0, 5, 4, 7, 6, 0, 8, NONE};
    struct left l = {.fd = memfd_create("inflight", MFD_CLOEXEC)};

    CHECK_EQ(ftruncate(l.fd, (off_t)region_size()), 0);
    l.shared = mmap(NULL, region_size(), PROT_READ | PROT_WRITE, MAP_SHARED, l.fd, 0);
    CHECK(l.shared != MAP_FAILED);
    CHECK_EQ(vhost_inflight_map(l.fd, 0, 1, REGION_QUEUE, true, &l.region), 0);
    l.desc = (void *)(l.shared + 1);
    *l.shared = (struct vhost_user_inflight_packed){
        .version = VHOST_USER_INFLIGHT_VERSION,
        .desc_num = REGION_QUEUE,
        .used_idx = MADE_AT - WRAP,
        .old_used_idx = MADE_AT - WRAP,
        .used_wrap_counter = 1,
        .old_used_wrap_counter = 1,
    };
    for (uint16_t i = 0; i < REGION_QUEUE; i++)
        l.desc[i].next = next[i];
    l.rig.guest = guest_new(GUEST_SIZE, 0);
    l.rig.ring = driver_new(&l.rig.guest, 0, SIZE, VERSION_1, MADE_AT);
    l.rig.control = control_new(0, 0);
    l.rig.probe = probe_new(1);
    struct driver_ring *d = &l.rig.ring;
    one_byte_each(d);
    set_desc(d->desc, 0, buffer_addr(d, 0), 1, VRING_DESC_F_NEXT, 1);
    set_desc(d->desc, 1, buffer_addr(d, 1), 2, VRING_DESC_F_NEXT, 2);
    driver_offer(d, 0);
    driver_offer(d, 7);
    driver_publish(d);
    l.desc[2].inflight = l.desc[1].inflight = 1;
    l.desc[2].num = 3;
    l.desc[2].last = 6;
    l.desc[1].num = l.desc[1].last = 1;
    l.desc[1].counter = 1;
    for (uint16_t i = 0; i < 4; i++) {
        uint16_t entry = (uint16_t[]){2, 5, 6, 1}[i];
        const struct vring_packed_desc *slot = &d->packed->slot[MADE_AT - WRAP + i];
        l.desc[entry].id = slot->id;
        l.desc[entry].flags = slot->flags;
        l.desc[entry].len = slot->len;
        l.desc[entry].addr = slot->addr;
    }
    return l;
}

static int revive(struct left *l)
{
    struct vhost_queue_config config = driver_config(&l->rig.ring, 0);

    config.inflight = l->region;
    return vhost_queue_new(&config, &l->rig.probe->device, l->rig.guest.memory, &l->rig.queue);
}

static void run(struct left *l)
{
    CHECK_EQ(revive(l), 0);
    queue_run(&l->rig.control, l->rig.queue);
}

static void end(struct left *l)
{
    struct rig *r = &l->rig;

    CHECK_EQ(vhost_queue_free(r->queue), 0);
    control_free(&r->control);
    vhost_device_free(&r->probe->device);
    driver_free(&r->ring);
    guest_free(&r->guest);
    vhost_inflight_unref(l->region);
    munmap(l->shared, region_size());
    close(l->fd);
}

/* The queue is refused, and nothing of the region or of the ring has changed. */
static void expect_refused(struct left *l)
{
    static char region[4096], ring[SIZE * 16];
    const void *slot = l->rig.ring.packed->slot;

    memcpy(region, l->shared, region_size());
    memcpy(ring, slot, sizeof(ring));
    CHECK_EQ(revive(l), -EBADMSG);
    CHECK(l->rig.queue == NULL);
    CHECK_EQ(memcmp(region, l->shared, region_size()), 0);
    CHECK_EQ(memcmp(ring, slot, sizeof(ring)), 0);
    end(l);
}

static void expect_served(struct left *l)
{
    struct driver_ring *d = &l->rig.ring;

    run(l);
    CHECK_EQ(driver_take(d).id, 0);
    CHECK_EQ(driver_take(d).id, 7);
    round_trip(d, 7);
    queue_halt(&l->rig.control, l->rig.queue);
    for (int i = 0; i < REGION_QUEUE; i++)
        CHECK_EQ(l->desc[i].inflight, 0);
    end(l);
}

/* What is changed below is what is wrong. */
static void an_honest_one(void)
{
    struct left l = left_open();

    expect_served(&l);
}

#define REFUSED(name, ...)                                                                         \
    static void name(void)                                                                         \
    {                                                                                              \
        struct left l = left_open();                                                               \
        __VA_ARGS__;                                                                               \
        expect_refused(&l);                                                                        \
    }

REFUSED(a_version_that_is_unknown, l.shared->version = 2)
REFUSED(a_number_of_descriptors_that_changed, l.shared->desc_num = SIZE)
REFUSED(a_flag_that_is_neither, l.desc[2].inflight = 2)
REFUSED(a_flag_of_a_free_entry_that_is_neither, l.desc[3].inflight = 255)
REFUSED(a_list_that_begins_outside, l.shared->old_free_head = NONE + 1)
REFUSED(a_list_that_is_empty, l.shared->old_free_head = NONE)
REFUSED(a_list_that_goes_outside, l.desc[8].next = 65535)
REFUSED(a_list_that_goes_round, l.desc[8].next = 3)
REFUSED(a_list_that_ends_early, l.desc[4].next = NONE)
REFUSED(a_list_with_a_chain_in_it, l.desc[3].next = 5)
REFUSED(a_used_index_outside, l.shared->used_idx = SIZE)
REFUSED(an_old_used_index_outside, l.shared->old_used_idx = SIZE)
REFUSED(a_wrap_counter_that_is_neither, l.shared->used_wrap_counter = 2)
REFUSED(an_old_wrap_counter_that_is_neither, l.shared->old_used_wrap_counter = 2)
REFUSED(a_chain_of_nothing, l.desc[1].num = 0)
REFUSED(a_chain_longer_than_it_is, l.desc[1].num = 2)
REFUSED(a_chain_longer_than_all, l.desc[2].num = 65535)
REFUSED(a_chain_that_goes_outside, l.desc[5].next = NONE)
REFUSED(a_chain_that_goes_round, l.desc[5].next = 2)
REFUSED(a_chain_that_goes_into_another, l.desc[5].next = 1)
REFUSED(a_chain_that_ends_elsewhere, l.desc[2].last = 5)
REFUSED(a_chain_in_a_chain, l.desc[5].inflight = 1; l.desc[5].num = 2; l.desc[5].last = 6)
REFUSED(a_chain_that_is_forgotten, l.desc[1].inflight = 0)

/* More descriptors than the ring has, each in its place in the region. */
static void more_than_the_ring_has(void)
{
    struct left l = left_open();

    l.shared->free_head = l.shared->old_free_head = NONE;
    for (uint16_t i = 0; i < REGION_QUEUE; i++) {
        l.desc[i].inflight = 1;
        l.desc[i].num = 1;
        l.desc[i].last = i;
    }
    expect_refused(&l);
}

/* In any order: but each once. */
static void counters_that_are_equal(void)
{
    struct left l = left_open();
    uint32_t seen = 0;

    l.desc[1].counter = 0;
    run(&l);
    seen |= 1u << driver_take(&l.rig.ring).id;
    seen |= 1u << driver_take(&l.rig.ring).id;
    CHECK_EQ(seen, 1 << 0 | 1 << 7);
    queue_halt(&l.rig.control, l.rig.queue);
    end(&l);
}

/* Whatever a chain of the region is made of, it is checked as any other. */
static void expect_fault(struct left *l, enum vhost_fault fault)
{
    run(l);
    CHECK_EQ(rig_await_fault(&l->rig), fault);
    queue_halt(&l->rig.control, l->rig.queue);
    end(l);
}

static void an_id_that_the_ring_does_not_have(void)
{
    struct left l = left_open();

    l.desc[6].id = SIZE;
    expect_fault(&l, VHOST_FAULT_HEAD_RANGE);
}

static void an_id_twice(void)
{
    struct left l = left_open();

    atomic_store(&l.rig.probe->hold, true);
    l.desc[1].id = l.desc[6].id;
    run(&l);
    CHECK_EQ(rig_await_fault(&l.rig), VHOST_FAULT_HEAD_BUSY);
    CHECK_EQ(eventfd_write(l.rig.probe->release, 1), 0);
    queue_halt(&l.rig.control, l.rig.queue);
    end(&l);
}

static void a_buffer_outside_memory(void)
{
    struct left l = left_open();

    l.desc[5].addr = UINT64_MAX;
    expect_fault(&l, VHOST_FAULT_ADDRESS);
}

/* Only the last has none, whatever is noted of NEXT. */
static void flags_that_end_a_chain_early(void)
{
    struct left l = left_open();

    for (int i = 0; i < REGION_QUEUE; i++)
        l.desc[i].flags &= (uint16_t)~VRING_DESC_F_NEXT;
    l.desc[1].flags |= VRING_DESC_F_NEXT;
    expect_served(&l);
}

static void a_table_in_the_middle(void)
{
    struct left l = left_open();

    l.desc[2].flags |= VRING_DESC_F_INDIRECT;
    expect_fault(&l, VHOST_FAULT_INDIRECT);
}

/* The region holds the descriptors of what was completed and is not shown: there is room for no
 * more.
 */
static void made_available_again_before_it_was_shown(void)
{
    struct left l = left_open();
    struct chain c;

    CHECK_EQ(revive(&l), 0);
    struct vhost_queue *q = l.rig.queue;
    struct driver_ring *d = &l.rig.ring;
    struct vhost_iothread *t = l.rig.control.thread;
    q->thread = t;
    for (int round = 0; round < 2; round++) {
        while (ring_pop(q, &c)) {
            q->dirty = true; /* nobody else looks at it meanwhile */
            ring_push(q, c.head, 0);
        }
        CHECK_EQ(q->broken, round);
        d->packed->take = d->packed->fill;
        for (uint16_t i = 0; i < SIZE; i++)
            packed_put(d->packed, buffer_addr(d, 0), 1, i, 0);
        packed_publish(d->packed);
    }
    struct vhost_event e = await_event(&l.rig.control, VHOST_EVENT_BROKEN, 1000);
    CHECK_EQ(e.value, VHOST_FAULT_CHAIN_LENGTH);
    q->thread = NULL;
    end(&l);
}

struct scribbler {
    struct left *l;
    atomic_bool stop;
};

static void *scribble(void *arg)
{
    struct scribbler *s = arg;
    uint64_t *word = (uint64_t *)s->l->shared, n = 1;

    while (!atomic_load(&s->stop)) {
        for (size_t i = 2; i < region_size() / sizeof(*word); i++) {
            n = n * 6364136223846793005u + 1442695040888963407u;
            __atomic_store_n(&word[i], (n >> 24) & 0x0003000100030001u, __ATOMIC_RELAXED);
        }
    }
    return NULL;
}

/* Its own chains come right all the same; whoever starts from that is refused, or survives it. */
static void scribbled_on_all_the_time(void)
{
    struct left l = left_open();
    struct scribbler s = {.l = &l};
    pthread_t thread;
    struct rig *r = &l.rig;

    run(&l);
    CHECK_EQ(driver_take(&r->ring).id, 0);
    CHECK_EQ(driver_take(&r->ring).id, 7);
    CHECK_EQ(pthread_create(&thread, NULL, scribble, &s), 0);
    for (int i = 0; i < 2000; i++)
        round_trip(&r->ring, (uint16_t)(2 + i % (SIZE - 2)));
    queue_halt(&r->control, r->queue);
    for (int i = 0; i < 2000; i++) {
        CHECK_EQ(vhost_queue_free(r->queue), 0);
        r->queue = NULL;
        int err = revive(&l);
        CHECK(err == 0 || err == -EBADMSG);
    }
    atomic_store(&s.stop, true);
    pthread_join(thread, NULL);
    end(&l);
}

static const struct test tests[] = {
    TEST(an_honest_one),
    TEST(a_version_that_is_unknown),
    TEST(a_number_of_descriptors_that_changed),
    TEST(a_flag_that_is_neither),
    TEST(a_flag_of_a_free_entry_that_is_neither),
    TEST(a_list_that_begins_outside),
    TEST(a_list_that_is_empty),
    TEST(a_list_that_goes_outside),
    TEST(a_list_that_goes_round),
    TEST(a_list_that_ends_early),
    TEST(a_list_with_a_chain_in_it),
    TEST(a_used_index_outside),
    TEST(an_old_used_index_outside),
    TEST(a_wrap_counter_that_is_neither),
    TEST(an_old_wrap_counter_that_is_neither),
    TEST(a_chain_of_nothing),
    TEST(a_chain_longer_than_it_is),
    TEST(a_chain_longer_than_all),
    TEST(a_chain_that_goes_outside),
    TEST(a_chain_that_goes_round),
    TEST(a_chain_that_goes_into_another),
    TEST(a_chain_that_ends_elsewhere),
    TEST(a_chain_in_a_chain),
    TEST(a_chain_that_is_forgotten),
    TEST(more_than_the_ring_has),
    TEST(counters_that_are_equal),
    TEST(an_id_that_the_ring_does_not_have),
    TEST(an_id_twice),
    TEST(a_buffer_outside_memory),
    TEST(flags_that_end_a_chain_early),
    TEST(a_table_in_the_middle),
    TEST(made_available_again_before_it_was_shown),
    TEST(scribbled_on_all_the_time),
};
MAIN(tests)
