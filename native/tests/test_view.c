/* Queues in views of memory, which wait for what is lacking there. */
#include "logged.h"

enum { SHIFT = 0x40000000, AREA = 0x1000, READ = VHOST_ACCESS_READ, WRITE = VHOST_ACCESS_WRITE };

#define BUFFERS (GUEST_BASE + AT_BUFFER)

/* The IOVA of what lies `offset` bytes into the buffers, where nothing is put elsewhere. */
#define IOVA(offset) (BUFFERS + SHIFT + (uint64_t)(offset))

static struct vhost_memory *view(const struct guest *g, const struct vhost_translation *entries,
                                 uint32_t n)
{
    struct vhost_memory *m;

    CHECK_EQ(vhost_memory_view(g->memory, entries, n, &m), 0);
    return m;
}

/* The ring at its IOVAs, and `n` translations of buffers. */
static struct vhost_memory *ring_view(const struct rig *r, const struct vhost_translation *buffers,
                                      uint32_t n)
{
    struct vhost_translation entries[8] = {
        {GUEST_BASE + SHIFT, AT_TABLE, GUEST_BASE, READ | WRITE}};

    CHECK(n < 8);
    for (uint32_t i = 0; i < n; i++)
        entries[i + 1] = buffers[i];
    return view(&r->guest, entries, n + 1);
}

static void open_in(struct rig *r, uint64_t features, const struct vhost_translation *buffers,
                    uint32_t n)
{
    *r = (struct rig){0};
    r->guest = guest_new(GUEST_SIZE, 0);
    features |= VERSION_1 | UINT64_C(1) << VIRTIO_F_ACCESS_PLATFORM;
    r->ring = driver_new(&r->guest, 0, 8, features, 0);
    r->control = control_new(0, 0);
    r->probe = probe_new(1);
    struct vhost_queue_config config = driver_config(&r->ring, 0);
    config.desc += SHIFT;
    config.avail += SHIFT;
    config.used += SHIFT;
    config.log_used = UNLOGGED;
    struct vhost_memory *m = ring_view(r, buffers, n);
    CHECK_EQ(vhost_queue_new(&config, &r->probe->device, m, &r->queue), 0);
    vhost_memory_unref(m);
    queue_run(&r->control, r->queue);
}

static void extend(struct rig *r, const struct vhost_translation *buffers, uint32_t n)
{
    struct vhost_memory *m = ring_view(r, buffers, n);

    CHECK_EQ(vhost_queue_extend_memory(r->queue, m, ++r->control.token), 0);
    vhost_memory_unref(m);
    CHECK_EQ(await_done(&r->control).result, 0);
}

static void expect_miss(struct rig *r, uint64_t iova, int access)
{
    struct vhost_event e = await_event(&r->control, VHOST_EVENT_MISS, 1000);

    CHECK_EQ(e.value, iova);
    CHECK_EQ(e.result, access);
}

/* No event is left. */
static void expect_no_miss(struct rig *r)
{
    queue_sync(&r->control, r->queue);
    CHECK_EQ(r->control.num_waiting, 0);
}

static void a_ring_that_is_not_shown_is_refused(void)
{
    struct guest g = guest_new(GUEST_SIZE, 0);
    struct driver_ring d = driver_new(&g, 0, 8, VERSION_1, 0);
    struct probe *probe = probe_new(1);
    struct vhost_queue_config config = driver_config(&d, 0);
    struct vhost_translation part[] = {{GUEST_BASE, AT_AVAIL, GUEST_BASE, READ | WRITE},
                                       {GUEST_BASE + AT_AVAIL, AREA, GUEST_BASE + AT_AVAIL, READ},
                                       {GUEST_BASE + AT_USED, AREA, GUEST_BASE + AT_USED, WRITE}};
    struct vhost_queue *q = NULL;

    for (uint32_t i = 0; i < 3; i++) {
        struct vhost_translation wrong[3];
        memcpy(wrong, part, sizeof(part));
        wrong[i].access = i == 2 ? READ : WRITE;
        struct vhost_memory *m = view(&g, wrong, 3);
        CHECK_EQ(vhost_queue_new(&config, &probe->device, m, &q), -EFAULT);
        vhost_memory_unref(m);
    }
    struct vhost_memory *m = view(&g, part, 3);
    CHECK_EQ(vhost_queue_new(&config, &probe->device, m, &q), 0);
    vhost_memory_unref(m);
    CHECK_EQ(vhost_queue_free(q), 0);
    vhost_device_free(&probe->device);
    driver_free(&d);
    guest_free(&g);
}

static void a_chain_waits_for_what_it_lacks(void)
{
    struct vhost_translation all[] = {{IOVA(0), AREA, BUFFERS, READ},
                                      {IOVA(AREA), AREA, BUFFERS + AREA, WRITE}};
    struct rig r;

    open_in(&r, 0, NULL, 0);
    struct driver_ring *d = &r.ring;
    memcpy(buffer_at(d, 3), "question", 8);
    set_desc(d->desc, 0, IOVA(3), 8, VRING_DESC_F_NEXT, 1);
    set_desc(d->desc, 1, IOVA(AREA), 16, VRING_DESC_F_WRITE, 0);
    driver_send(d, 0);
    expect_miss(&r, IOVA(3), READ);
    driver_kick(d); /* changes nothing */
    expect_no_miss(&r);
    extend(&r, all, 1);
    expect_miss(&r, IOVA(AREA), WRITE);
    CHECK_EQ(probe_count(r.probe), 0);
    extend(&r, all, 2);
    CHECK_EQ(driver_take(d).len, 16);
    CHECK(memcmp(probe_get(r.probe, 0).bytes, "question", 8) == 0);
    CHECK_EQ(*(unsigned char *)buffer_at(d, AREA + 15), PATTERN);
    round_trip(d, 0);
    expect_no_miss(&r);
    rig_close(&r);
}

static void access_that_is_not_allowed_is_lacking(void)
{
    struct vhost_translation t = {IOVA(0), AREA, BUFFERS, READ};
    struct rig r;

    open_in(&r, 0, &t, 1);
    set_desc(r.ring.desc, 0, IOVA(0), 4, VRING_DESC_F_WRITE, 0);
    driver_send(&r.ring, 0);
    expect_miss(&r, IOVA(0), WRITE);
    extend(&r, &t, 1);
    expect_miss(&r, IOVA(0), WRITE);
    t.access = WRITE;
    extend(&r, &t, 1);
    CHECK_EQ(driver_take(&r.ring).len, 4);
    set_desc(r.ring.desc, 1, IOVA(0), 4, 0, 0);
    driver_send(&r.ring, 1);
    expect_miss(&r, IOVA(0), READ);
    rig_close(&r);
}

static void a_buffer_over_several_entries_is_split(void)
{
    /* In IOVAs one after the other, in memory the other way round, and 64 more than a queue
     * without a view has room for. */
    struct vhost_translation t[] = {{IOVA(0), AREA, BUFFERS + 2 * AREA, READ},
                                    {IOVA(AREA), AREA, BUFFERS + AREA, READ},
                                    {IOVA(2 * AREA), AREA, BUFFERS, READ}};
    struct rig r;

    open_in(&r, 0, t, 2);
    struct driver_ring *d = &r.ring;
    memcpy(buffer_at(d, 3 * AREA - 2), "ab", 2);
    memcpy(buffer_at(d, 0), "yz", 2);
    set_desc(d->desc, 0, IOVA(AREA - 2), AREA + 4, 0, 0);
    driver_send(d, 0);
    expect_miss(&r, IOVA(2 * AREA), READ);
    extend(&r, t, 3);
    CHECK_EQ(driver_take(d).id, 0);
    struct note n = probe_get(r.probe, 0);
    CHECK_EQ(n.readable, 3);
    CHECK_EQ(n.splits, 2);
    CHECK_EQ(n.readable_len, AREA + 4);
    CHECK(memcmp(n.bytes, "ab", 2) == 0);
    rig_close(&r);
}

static void a_buffer_that_wraps_breaks_the_ring(void)
{
    struct rig r;

    open_in(&r, 0, NULL, 0);
    set_desc(r.ring.desc, 0, UINT64_MAX - 5, 7, 0, 0);
    driver_send(&r.ring, 0);
    CHECK_EQ(rig_await_fault(&r), VHOST_FAULT_ADDRESS);
    rig_close(&r);
}

/* The driver's table lies at the end of an area; the view has it where its parts are told to be. */
static void an_indirect_table_may_be_lacking(void)
{
    const uint64_t table = GUEST_BASE + AT_TABLE, cut = table + 16;
    struct vhost_translation t[] = {{table + SHIFT, 16, table, READ},
                                    {cut + SHIFT, AREA - 16, cut, READ},
                                    {IOVA(0), AREA, BUFFERS, READ | WRITE}};
    struct rig r;

    open_in(&r, INDIRECT, NULL, 0);
    struct driver_ring *d = &r.ring;
    memcpy(buffer_at(d, 0), "x", 1);
    set_desc(driver_table(d), 0, IOVA(0), 1, VRING_DESC_F_NEXT, 1);
    set_desc(driver_table(d), 1, IOVA(1), 1, VRING_DESC_F_WRITE, 0);
    /* The driver looks at the table where it is, and the device's descriptor says the IOVA. */
    set_desc(d->desc, 0, table, 32, VRING_DESC_F_INDIRECT, 0);
    driver_offer(d, 0);
    uint64_t iova = table + SHIFT;
    memcpy(guest_at(&r.guest, GUEST_BASE + AT_DESC), &iova, sizeof(iova));
    driver_publish(d);
    driver_kick(d);
    expect_miss(&r, table + SHIFT, READ);
    extend(&r, t, 1);
    expect_miss(&r, cut + SHIFT, READ);
    extend(&r, t, 2);
    expect_miss(&r, IOVA(0), READ);
    extend(&r, t, 3);
    CHECK_EQ(driver_take(d).len, 1);
    CHECK_EQ(probe_get(r.probe, 0).bytes[0], 'x');
    rig_close(&r);
}

static void a_queue_that_waits_can_stop(void)
{
    struct vhost_translation t = {IOVA(0), AREA, BUFFERS, READ | WRITE};
    struct rig r;

    open_in(&r, 0, NULL, 0);
    set_desc(r.ring.desc, 0, IOVA(0), 1, VRING_DESC_F_WRITE, 0);
    driver_send(&r.ring, 0);
    expect_miss(&r, IOVA(0), WRITE);
    CHECK_EQ(queue_halt(&r.control, r.queue), driver_next_index(&r.ring, 0));
    queue_run(&r.control, r.queue); /* in the same view: it waits still, and has told of it */
    struct vhost_memory *m = ring_view(&r, &t, 1);
    CHECK_EQ(vhost_queue_set_memory(r.queue, m, ++r.control.token), 0);
    vhost_memory_unref(m);
    CHECK_EQ(await_done(&r.control).result, 0);
    CHECK_EQ(driver_take(&r.ring).id, 0);
    CHECK_EQ(queue_halt(&r.control, r.queue), driver_next_index(&r.ring, 1));
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

static void only_what_is_taken_back_is_drained(void)
{
    struct vhost_translation t[] = {{IOVA(0), AREA, BUFFERS, READ | WRITE},
                                    {IOVA(AREA), AREA, BUFFERS + AREA, READ | WRITE}};
    struct rig r;

    open_in(&r, 0, t, 1);
    atomic_store(&r.probe->hold, true);
    set_desc(r.ring.desc, 0, IOVA(0), 1, VRING_DESC_F_WRITE, 0);
    set_desc(r.ring.desc, 1, IOVA(AREA), 1, VRING_DESC_F_WRITE, 0);
    driver_send(&r.ring, 0);
    driver_send(&r.ring, 1);
    expect_miss(&r, IOVA(AREA), WRITE);
    extend(&r, t, 2); /* while the first is in flight */
    queue_sync(&r.control, r.queue);
    CHECK_EQ(probe_count(r.probe), 2);
    struct vhost_memory *m = ring_view(&r, t, 1);
    uint64_t token = ++r.control.token;
    CHECK_EQ(vhost_queue_set_memory(r.queue, m, token), 0);
    vhost_memory_unref(m);
    queue_sync(&r.control, r.queue);
    for (uint32_t i = 0; i < r.control.num_waiting; i++)
        CHECK(r.control.waiting[i].token != token);
    atomic_store(&r.probe->hold, false);
    CHECK_EQ(eventfd_write(r.probe->release, 1), 0);
    CHECK_EQ(await_event(&r.control, VHOST_EVENT_DONE, token).result, 0);
    CHECK_EQ(driver_take(&r.ring).id, 0);
    CHECK_EQ(driver_take(&r.ring).id, 1);
    driver_send(&r.ring, 1);
    expect_miss(&r, IOVA(AREA), WRITE);
    rig_close(&r);
}

/* What is logged are guest addresses, of the ring too, whatever the driver calls them. */
static void the_log_is_of_guest_memory(void)
{
    struct vhost_translation t = {IOVA(0), AREA, BUFFERS + 5 * AREA, READ | WRITE};
    struct vhost_log *log = log_of_guest();
    struct rig r;

    open_in(&r, 0, &t, 1);
    set_log(&r.control, r.queue, log, r.ring.base + AT_USED + SHIFT);
    take_pages(log);
    set_desc(r.ring.desc, 0, IOVA(8), 16, VRING_DESC_F_WRITE, 0);
    round_trip(&r.ring, 0);
    queue_sync(&r.control, r.queue);
    struct pages p = take_pages(log);
    expect_ring(&p, &r.ring);
    expect_no_more(&p); /* the probe does not log its buffers */
    struct iovec iov = {.iov_base = vhost_memory_translate(r.guest.memory, BUFFERS + 5 * AREA, 1),
                        .iov_len = 16};
    queue_halt(&r.control, r.queue);
    take_pages(log);
    log_written(r.queue, &iov, 1, 16);
    log_flush(r.queue);
    p = take_pages(log);
    expect_pages(&p, BUFFERS + 5 * AREA, 16);
    forget_pages(&p, BUFFERS + 5 * AREA, 16);
    expect_no_more(&p);
    queue_run(&r.control, r.queue);
    rig_close(&r);
    vhost_log_unref(log);
}

/* ---- rings in pieces ---- */

enum { PIECES = 20, FROM = 0x80000 }; /* in pages; where the driver's ring lies otherwise */

/* A ring whose share of memory, AREA by AREA, lies the other way round from FROM on. */
static struct vhost_memory *scattered(const struct guest *g)
{
    struct vhost_translation entries[PIECES];

    for (uint32_t i = 0; i < PIECES; i++)
        entries[i] = (struct vhost_translation){
            SHIFT + (uint64_t)AREA * i, AREA, GUEST_BASE + FROM + (uint64_t)AREA * (PIECES - 1 - i),
            READ | WRITE};
    return view(g, entries, PIECES);
}

static char *scattered_at(const struct guest *g, uint64_t offset)
{
    return g->host + FROM + AREA * (PIECES - 1 - offset / AREA) + offset % AREA;
}

/* The driver's own ring is in one piece; what it writes there is copied to where the device looks,
 * and what the device writes comes back. */
static void copy_ring(const struct driver_ring *d, bool to_device, uint64_t offset, uint64_t len)
{
    for (uint64_t at = offset; at < offset + len; at++) {
        char *ours = guest_at(d->guest, d->base + at), *theirs = scattered_at(d->guest, at);
        *(to_device ? theirs : ours) = *(to_device ? ours : theirs);
    }
}

static void a_ring_may_be_in_pieces(void)
{
    enum { SIZE = 1024 }; /* four pages of descriptors */
    struct vhost_log *log = log_of_guest();
    struct rig r = {.guest = guest_new(GUEST_SIZE, 0), .control = control_new(0, 0)};
    struct driver_ring *d = &r.ring;

    r.ring = driver_new(&r.guest, 0, SIZE, VERSION_1, 0);
    r.probe = probe_new(1);
    struct vhost_queue_config config = driver_config(d, 0);
    set_desc(d->desc, SIZE - 1, SHIFT + AT_TABLE - 8, 8, VRING_DESC_F_WRITE, 0);
    driver_offer(d, SIZE - 1);
    driver_publish(d);
    copy_ring(d, true, 0, AT_TABLE);
    config.desc = SHIFT + AT_DESC;
    config.avail = SHIFT + AT_AVAIL;
    config.used = SHIFT + AT_USED;
    config.log = log;
    config.log_used = config.used;
    struct vhost_memory *m = scattered(&r.guest);
    CHECK_EQ(vhost_queue_new(&config, &r.probe->device, m, &r.queue), 0);
    vhost_memory_unref(m);
    take_pages(log);
    queue_run(&r.control, r.queue);
    await_signal(d->call);
    CHECK_EQ((unsigned char)*scattered_at(&r.guest, AT_TABLE - 1), PATTERN);
    queue_halt(&r.control, r.queue);
    struct pages p = take_pages(log);
    uint64_t at = d->packed ? AT_DESC : AT_USED;
    expect_pages(&p, GUEST_BASE + (uint64_t)(scattered_at(&r.guest, at) - r.guest.host), 1);
    copy_ring(d, false, at, AREA);
    CHECK_EQ(driver_take(d).len, 8);
    CHECK_EQ(vhost_queue_free(r.queue), 0);
    vhost_log_unref(log);
    control_free(&r.control);
    vhost_device_free(&r.probe->device);
    driver_free(d);
    guest_free(&r.guest);
}

static void a_ring_in_pieces_may_be_cut_short(void)
{
    struct guest g = guest_new(GUEST_SIZE, 0);
    struct rig r = {.guest = g, .control = control_new(0, 0)};

    r.ring = driver_new(&r.guest, 0, 1024, VERSION_1, 0);
    r.probe = probe_new(1);
    copy_ring(&r.ring, true, 0, AT_TABLE);
    struct vhost_queue_config config = driver_config(&r.ring, 0);
    config.desc = SHIFT + AT_DESC;
    config.avail = SHIFT + AT_AVAIL;
    config.used = SHIFT + AT_USED;
    struct vhost_memory *m = scattered(&r.guest);
    CHECK_EQ(vhost_queue_new(&config, &r.probe->device, m, &r.queue), 0);
    vhost_memory_unref(m);
    queue_run(&r.control, r.queue);
    CHECK_EQ(ftruncate(g.fd, 0), 0);
    driver_kick(&r.ring);
    CHECK_EQ(rig_await_fault(&r), VHOST_FAULT_MEMORY);
    rig_close(&r);
}

static const struct test tests[] = {
    TEST(a_ring_that_is_not_shown_is_refused),
    TEST(a_chain_waits_for_what_it_lacks),
    TEST(access_that_is_not_allowed_is_lacking),
    TEST(a_buffer_over_several_entries_is_split),
    TEST(a_buffer_that_wraps_breaks_the_ring),
    TEST(an_indirect_table_may_be_lacking),
    TEST(a_queue_that_waits_can_stop),
    TEST(only_what_is_taken_back_is_drained),
    TEST(the_log_is_of_guest_memory),
    TEST(a_ring_may_be_in_pieces),
    TEST(a_ring_in_pieces_may_be_cut_short),
};
MAIN(tests)
