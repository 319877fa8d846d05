/* Batches: chains cross to the control thread and back, each exactly once, within a bound. */
#include "desk.h"

static void a_chain_crosses_over(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    strcpy(buffer_at(&d.ring, 0), "ping");
    set_desc(d.ring.desc, 0, buffer_addr(&d.ring, 0), 4, VRING_DESC_F_NEXT, 1);
    set_desc(d.ring.desc, 1, buffer_addr(&d.ring, 64), 8, VRING_DESC_F_WRITE, 0);
    offer(&d, 0, 1);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, CHAINS), 1);
    const struct vhost_chain *c = &d.chain[0];
    CHECK_EQ(c->readable, 1);
    CHECK_EQ(c->writable, 1);
    CHECK_EQ(c->readable_len, 4);
    CHECK_EQ(c->writable_len, 8);
    CHECK(memcmp(c->buffers[0].base, "ping", 4) == 0);
    CHECK_EQ(c->buffers[1].size, 8);
    CHECK_EQ(c->buffers[1].guest_addr, buffer_addr(&d.ring, 64));
    memcpy(c->buffers[1].base, "pong", 4);
    CHECK_EQ(complete(&d, c->id, 4), 0);
    struct vring_used_elem used = driver_take(&d.ring);
    CHECK_EQ(used.id, 0);
    CHECK_EQ(used.len, 4);
    CHECK(memcmp(buffer_at(&d.ring, 64), "pong", 4) == 0);
    CHECK_EQ(counter(&d, VHOST_COUNTER_REQUESTS), 1);
    CHECK_EQ(counter(&d, VHOST_COUNTER_COMPLETIONS), 1);
    CHECK_EQ(counter(&d, VHOST_COUNTER_BYTES_READ), 4);
    CHECK_EQ(counter(&d, VHOST_COUNTER_BYTES_WRITTEN), 4);
    desk_close(&d);
}

static void a_buffer_over_two_regions_has_both_addresses(void)
{
    struct desk d;
    uint64_t split = 0x20000;

    desk_open(&d, 8, 0, split);
    set_desc(d.ring.desc, 0, GUEST_BASE + split - 16, 48, VRING_DESC_F_WRITE, 0);
    offer_and_take(&d, 0, 1);
    CHECK_EQ(d.chain[0].writable, 2);
    CHECK_EQ(d.chain[0].buffers[0].guest_addr, GUEST_BASE + split - 16);
    CHECK_EQ(d.chain[0].buffers[0].size, 16);
    CHECK_EQ(d.chain[0].buffers[1].guest_addr, GUEST_BASE + split);
    CHECK_EQ(d.chain[0].buffers[1].size, 32);
    CHECK_EQ(complete(&d, d.chain[0].id, 48), 0);
    CHECK_EQ(driver_take(&d.ring).len, 48);
    desk_close(&d);
}

static void one_event_tells_of_a_batch(void)
{
    struct desk d;

    desk_open(&d, 64, 0, 0);
    for (uint16_t i = 0; i < 48; i++) {
        offer(&d, i, 1);
        settle(&d);
    }
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, 40), 40);
    offer(&d, 48, 1);
    settle(&d);
    CHECK(!was_told(&d)); /* the eight that are left were told of */
    struct vhost_chain_done done[CHAINS];
    for (uint32_t i = 0; i < 40; i++)
        done[i] = (struct vhost_chain_done){.id = d.chain[i].id, .written = 1};
    CHECK_EQ(vhost_batch_complete(d.device, 0, done, 40), 0);
    for (uint32_t i = 0; i < 40; i++)
        CHECK_EQ(driver_take(&d.ring).id, i);
    CHECK_EQ(take(&d, CHAINS), 9);
    for (uint32_t i = 0; i < 9; i++)
        CHECK_EQ(complete(&d, d.chain[i].id, 0), 0);
    driver_await_used(&d.ring, 9);
    offer(&d, 0, 1);
    await_told(&d, VHOST_EVENT_CHAINS);
    desk_close(&d);
}

static void each_chain_is_done_once(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    CHECK_EQ(complete(&d, 0, 0), -EINVAL);
    offer(&d, 0, 3);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(complete(&d, 0, 0), -EINVAL); /* not taken yet */
    CHECK_EQ(vhost_batch_give_back(d.device, 0, 0), -EINVAL);
    CHECK_EQ(take(&d, 2), 2);
    CHECK_EQ(complete(&d, 0, 2), -ERANGE);
    CHECK_EQ(complete(&d, 8, 0), -EINVAL);
    CHECK_EQ(complete(&d, UINT32_MAX, 0), -EINVAL);
    /* All or nothing. */
    struct vhost_chain_done twice[] = {{.id = 0}, {.id = 1}, {.id = 1}};
    CHECK_EQ(vhost_batch_complete(d.device, 0, twice, 3), -EINVAL);
    CHECK_EQ(vhost_batch_complete(d.device, 0, twice, 2), 0);
    CHECK_EQ(vhost_batch_complete(d.device, 0, twice, 1), -EINVAL);
    CHECK_EQ(vhost_batch_give_back(d.device, 0, 1), -EINVAL);
    driver_await_used(&d.ring, 2);
    CHECK_EQ(vhost_batch_complete(d.device, 0, twice, 1), -EINVAL);
    CHECK_EQ(complete(&d, 2, 0), -EINVAL); /* waits */
    CHECK_EQ(vhost_batch_complete(d.device, 1, twice, 1), -EINVAL);
    CHECK_EQ(vhost_batch_take(d.device, 1, d.chain, 1, NULL), 0);
    desk_close(&d);
}

static void a_chain_given_back_waits_without_an_event(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    offer_and_take(&d, 0, 1);
    CHECK_EQ(vhost_batch_give_back(d.device, 0, 0), 0);
    CHECK(!was_told(&d));
    offer(&d, 1, 1);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, CHAINS), 2);
    CHECK_EQ(d.chain[0].id, 0);
    CHECK_EQ(complete(&d, 0, 0), 0);
    CHECK_EQ(complete(&d, 1, 0), 0);
    driver_await_used(&d.ring, 2);
    desk_close(&d);
}

static void what_is_popped_ahead_is_bounded(void)
{
    struct desk d;
    uint32_t done = 0;

    desk_open(&d, RING_MAX, 0, 0);
    offer(&d, 0, RING_MAX);
    await_told(&d, VHOST_EVENT_CHAINS);
    settle(&d);
    CHECK_EQ(counter(&d, VHOST_COUNTER_REQUESTS), VHOST_BATCH_CHAINS);
    while (done < RING_MAX) {
        int n = take(&d, CHAINS);
        for (int i = 0; i < n; i++)
            CHECK_EQ(complete(&d, d.chain[i].id, 1), 0);
        done += (uint32_t)n;
        settle(&d);
        CHECK(counter(&d, VHOST_COUNTER_REQUESTS) <= done + VHOST_BATCH_CHAINS);
    }
    driver_await_used(&d.ring, RING_MAX);
    desk_close(&d);
}

/* One indirect table in guest memory, and chain after chain that is all of it. */
static void the_buffers_of_all_chains_are_bounded(void)
{
    struct desk d;
    struct vring_desc *table;

    desk_open(&d, RING_MAX, INDIRECT, 0);
    table = driver_table(&d.ring);
    for (uint16_t i = 0; i < RING_MAX; i++) {
        uint16_t more = i + 1 < RING_MAX ? VRING_DESC_F_NEXT : 0;
        set_desc(table, i, buffer_addr(&d.ring, 0), 1, VRING_DESC_F_WRITE | more, i + 1);
        set_desc(d.ring.desc, i, d.ring.base + AT_TABLE, RING_MAX * sizeof(*table),
                 VRING_DESC_F_INDIRECT, 0);
    }
    offer(&d, 0, RING_MAX);
    settle(&d);
    CHECK_EQ(counter(&d, VHOST_COUNTER_REQUESTS), VHOST_BATCH_BUFFERS / RING_MAX);
    CHECK_EQ(queue_halt(&d.control, d.queue), driver_next_index(&d.ring, 0));
    queue_run(&d.control, d.queue);
    desk_close(&d);
}

static void memory_outlives_its_queue(void)
{
    struct desk d;
    struct vhost_memory *memory;

    desk_open(&d, 8, 0, 0);
    *(char *)buffer_at(&d.ring, 0) = 'x';
    offer(&d, 0, 1);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(vhost_batch_take(d.device, 0, d.chain, 1, &memory), 1);
    const char *kept = d.chain[0].buffers[0].base;
    CHECK_EQ(complete(&d, 0, 1), 0);
    desk_close(&d);
    CHECK_EQ(*kept, 'x');
    vhost_memory_unref(memory);
}

static void an_index_is_served_once(void)
{
    struct desk d;
    struct vhost_queue *second;

    desk_open(&d, 8, 0, 0);
    struct vhost_queue_config config = driver_config(&d.ring, 0);
    CHECK_EQ(vhost_queue_new(&config, d.device, d.guest.memory, &second), -EBUSY);
    CHECK_EQ(vhost_batch_new(0, d.events, &d.device), -EINVAL);
    desk_close(&d);
}

static void discarded_memory_reads_zeroes(void)
{
    struct guest g = guest_new(GUEST_SIZE, 0x20000);
    char *page = g.host + 0x4000;

    page[0] = page[4096] = 'x';
    CHECK_EQ(vhost_memory_discard(g.memory, GUEST_BASE + 0x4000, 4096), 0);
    CHECK_EQ(page[0], 0);
    CHECK_EQ(page[4096], 'x');
    CHECK_EQ(vhost_memory_discard(g.memory, GUEST_BASE + 0x5000, 0), 0);
    CHECK_EQ(vhost_memory_discard(g.memory, GUEST_BASE + 0x5001, 4096), -EINVAL);
    CHECK_EQ(vhost_memory_discard(g.memory, GUEST_BASE + 0x5000, 4095), -EINVAL);
    CHECK_EQ(vhost_memory_discard(g.memory, GUEST_BASE + 0x1f000, 8192), -EFAULT);
    CHECK_EQ(vhost_memory_discard(g.memory, GUEST_BASE + GUEST_SIZE, 4096), -EFAULT);
    CHECK_EQ(vhost_memory_discard(g.memory, GUEST_BASE, UINT64_MAX), -EFAULT);
    CHECK_EQ(page[4096], 'x');
    guest_free(&g);
}

static const struct test tests[] = {
    TEST(a_chain_crosses_over),
    TEST(a_buffer_over_two_regions_has_both_addresses),
    TEST(one_event_tells_of_a_batch),
    TEST(each_chain_is_done_once),
    TEST(a_chain_given_back_waits_without_an_event),
    TEST(what_is_popped_ahead_is_bounded),
    TEST(the_buffers_of_all_chains_are_bounded),
    TEST(memory_outlives_its_queue),
    TEST(an_index_is_served_once),
    TEST(discarded_memory_reads_zeroes),
};
MAIN(tests)
