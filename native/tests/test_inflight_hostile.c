/*
 * Catalogue, control plane 35: what a front-end may have written into an in-flight region, and what
 * it may do to its file.
 */
#include "killed.h"

/* ---- what it says before a start ---- */

/* The queue is refused, and nothing of the region has changed. */
static void expect_refused(struct killed *k, int err)
{
    static char before[4096];
    uint64_t size = vhost_inflight_size(QUEUES, SIZE, false);

    memcpy(before, k->host, size);
    CHECK_EQ(revive(k, true), err);
    CHECK_EQ(memcmp(before, k->host, size), 0);
    CHECK(k->rig.queue == NULL);
    end(k);
}

static struct killed shown(uint16_t batch)
{
    struct killed k;

    killed_open(&k);
    for (uint16_t i = 0; i < SIZE; i++)
        k.chain[i] = (struct vhost_user_inflight_chain){.inflight = 1, .next = i ? i - 1 : 0};
    k.shared->last_batch_head = SIZE - 1;
    k.rig.ring.used[1] = batch;
    return k;
}

static void a_version_that_is_unknown(void)
{
    struct killed k = shown(1);

    k.shared->version = 2;
    expect_refused(&k, -EBADMSG);
}

static void a_number_of_descriptors_that_changed(void)
{
    static const uint16_t wrong[] = {0, SIZE - 1, SIZE + 1, 65535};

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        struct killed k = shown(1);
        k.shared->desc_num = wrong[i];
        expect_refused(&k, -EBADMSG);
    }
}

static void a_flag_that_is_neither(void)
{
    static const uint8_t wrong[] = {2, 3, 128, 255};

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        struct killed k = shown(1);
        k.chain[i].inflight = wrong[i];
        expect_refused(&k, -EBADMSG);
    }
}

static void a_batch_that_begins_outside(void)
{
    static const uint16_t wrong[] = {SIZE, SIZE + 1, 65535};

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        struct killed k = shown(1);
        k.shared->last_batch_head = wrong[i];
        expect_refused(&k, -EBADMSG);
    }
}

static void a_batch_that_goes_outside(void)
{
    struct killed k = shown(3);

    k.chain[SIZE - 2].next = SIZE;
    expect_refused(&k, -EBADMSG);
}

static void a_batch_that_goes_round(void)
{
    struct killed k = shown(4), own = shown(2);

    k.chain[SIZE - 3].next = SIZE - 1;
    expect_refused(&k, -EBADMSG);
    own.chain[SIZE - 1].next = SIZE - 1;
    expect_refused(&own, -EBADMSG);
}

static void a_batch_larger_than_the_ring(void)
{
    struct killed k = shown(SIZE + 1), back = shown(0), whole = shown(SIZE);

    expect_refused(&k, -EBADMSG);
    back.shared->used_idx = 1; /* the used index went back by one */
    expect_refused(&back, -EBADMSG);
    whole.rig.ring.avail_idx = whole.rig.ring.avail[1] = SIZE;
    run(&whole);
    queue_halt(&whole.rig.control, whole.rig.queue);
    CHECK_EQ(probe_count(whole.rig.probe), 0);
    expect_idle(&whole);
    end(&whole);
}

static void chains_behind_the_end_of_the_ring(void)
{
    struct killed k;

    killed_open(&k);
    struct vhost_inflight *small;
    CHECK_EQ(vhost_inflight_map(k.fd, 0, QUEUES, SIZE / 2, false, &small), 0);
    vhost_inflight_unref(k.region);
    k.region = small;
    expect_refused(&k, -EBADMSG);

    killed_open_sized(&k, SIZE / 2, SIZE);
    k.shared->version = VHOST_USER_INFLIGHT_VERSION;
    k.shared->desc_num = SIZE;
    k.chain[SIZE / 2].inflight = 1;
    expect_refused(&k, -EBADMSG);
}

/* In any order: but each once. */
static void counters_that_are_equal(void)
{
    struct killed k = shown(0);
    uint32_t seen = 0;

    for (uint16_t i = 0; i < SIZE; i++)
        driver_offer(&k.rig.ring, i);
    driver_publish(&k.rig.ring);
    run(&k);
    for (uint16_t i = 0; i < SIZE; i++)
        seen |= 1u << driver_take(&k.rig.ring).id;
    CHECK_EQ(seen, 0xff);
    queue_halt(&k.rig.control, k.rig.queue);
    expect_idle(&k);
    end(&k);
}

/* More in flight than was ever made available: the ring breaks when it comes to that. */
static void chains_that_nobody_made_available(void)
{
    struct killed k = shown(0);

    run(&k);
    CHECK_EQ(rig_await_fault(&k.rig), VHOST_FAULT_AVAIL_INDEX);
    queue_halt(&k.rig.control, k.rig.queue);
    end(&k);
}

static void a_device_that_gives_chains_back(void)
{
    struct killed k;
    struct vhost_device *batch;

    killed_open(&k);
    CHECK_EQ(vhost_batch_new(1, k.rig.control.events, &batch), 0);
    struct vhost_queue_config config = driver_config(&k.rig.ring, 0);
    config.inflight = k.region;
    CHECK_EQ(vhost_queue_new(&config, batch, k.rig.guest.memory, &k.rig.queue), -EOPNOTSUPP);
    vhost_device_free(batch);
    end(&k);
}

/* The other layout stands there. */
static void a_ring_of_the_other_layout(void)
{
    struct killed k;

    killed_open(&k);
    k.rig.ring.features |= PACKED;
    CHECK_EQ(revive_at(&k, 0x80008000, true), -EBADMSG);
    end(&k);
}

static void regions_that_cannot_be(void)
{
    int fd = memfd_create("inflight", MFD_CLOEXEC);
    struct vhost_inflight *region;
    uint64_t size = vhost_inflight_size(QUEUES, SIZE, false);

    CHECK_EQ(ftruncate(fd, (off_t)size), 0);
    CHECK_EQ(vhost_inflight_map(fd, 0, 0, SIZE, false, &region), -EINVAL);
    CHECK_EQ(vhost_inflight_map(fd, 0, QUEUES, 0, false, &region), -EINVAL);
    CHECK_EQ(vhost_inflight_map(fd, 0, QUEUES, 65535, false, &region), -EINVAL);
    CHECK_EQ(vhost_inflight_map(fd, 4, 1, SIZE, false, &region), -EINVAL);
    CHECK_EQ(vhost_inflight_map(fd, UINT64_MAX - 7, QUEUES, SIZE, false, &region), -EINVAL);
    CHECK_EQ(vhost_inflight_map(fd, 8, QUEUES, SIZE, false, &region), -ENXIO);
    CHECK_EQ(vhost_inflight_map(fd, 0, QUEUES + 1, SIZE, false, &region), -ENXIO);
    close(fd);
}

/* ---- the file goes, or changes, under us ---- */

static void truncated_before_the_start(void)
{
    struct killed k;

    killed_open(&k);
    CHECK_EQ(ftruncate(k.fd, 0), 0);
    CHECK_EQ(revive(&k, true), -ENODATA);
    end(&k);
}

static void truncated_under_a_running_queue(void)
{
    struct killed k;

    killed_open(&k);
    run(&k);
    round_trip(&k.rig.ring, 0);
    CHECK_EQ(ftruncate(k.fd, 0), 0);
    driver_send(&k.rig.ring, 1);
    CHECK_EQ(rig_await_fault(&k.rig), VHOST_FAULT_INFLIGHT);
    CHECK_EQ(driver_take(&k.rig.ring).id, 1);
    queue_halt(&k.rig.control, k.rig.queue);
    end(&k);
}

struct scribbler {
    struct killed *k;
    atomic_bool stop;
};

static void *scribble(void *arg)
{
    struct scribbler *s = arg;
    uint64_t *word = (uint64_t *)s->k->host, n = 1;

    while (!atomic_load(&s->stop)) {
        for (size_t i = 0; i < vhost_inflight_size(1, SIZE, false) / sizeof(*word); i++) {
            n = n * 6364136223846793005u + 1442695040888963407u;
            __atomic_store_n(&word[i], n, __ATOMIC_RELAXED);
        }
    }
    return NULL;
}

/* Its own chains come right all the same; whoever starts from that is refused, or survives it. */
static void scribbled_on_all_the_time(void)
{
    struct killed k;
    struct scribbler s = {.k = &k};
    pthread_t thread;
    struct rig *r = &k.rig;

    killed_open(&k);
    run(&k);
    CHECK_EQ(pthread_create(&thread, NULL, scribble, &s), 0);
    for (int i = 0; i < 2000; i++)
        round_trip(&r->ring, (uint16_t)(i % SIZE));
    queue_halt(&r->control, r->queue);
    for (int i = 0; i < 2000; i++) {
        CHECK_EQ(vhost_queue_free(r->queue), 0);
        r->queue = NULL;
        /* Where most of it is right, more is reached. */
        __atomic_store_n(&k.shared->version, 1, __ATOMIC_RELAXED);
        __atomic_store_n(&k.shared->desc_num, SIZE, __ATOMIC_RELAXED);
        int err = revive(&k, true);
        CHECK(err == 0 || err == -EBADMSG);
    }
    atomic_store(&s.stop, true);
    pthread_join(thread, NULL);
    end(&k);
}

static const struct test tests[] = {
    TEST(a_version_that_is_unknown),       TEST(a_number_of_descriptors_that_changed),
    TEST(a_flag_that_is_neither),          TEST(a_batch_that_begins_outside),
    TEST(a_batch_that_goes_outside),       TEST(a_batch_that_goes_round),
    TEST(a_batch_larger_than_the_ring),    TEST(chains_behind_the_end_of_the_ring),
    TEST(counters_that_are_equal),         TEST(chains_that_nobody_made_available),
    TEST(a_device_that_gives_chains_back), TEST(a_ring_of_the_other_layout),
    TEST(regions_that_cannot_be),          TEST(truncated_before_the_start),
    TEST(truncated_under_a_running_queue), TEST(scribbled_on_all_the_time),
};
MAIN(tests)
