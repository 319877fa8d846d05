/*
 * In-flight tracking.  A server's stores are made one after another up to the kill, and a real
 * queue goes on from what they left.
 */
#include "killed.h"

/* ---- the layout ---- */

static void the_layout(void)
{
    CHECK_EQ(sizeof(struct vhost_user_inflight_split), 16);
    CHECK_EQ(offsetof(struct vhost_user_inflight_split, version), 8);
    CHECK_EQ(offsetof(struct vhost_user_inflight_split, desc_num), 10);
    CHECK_EQ(offsetof(struct vhost_user_inflight_split, last_batch_head), 12);
    CHECK_EQ(offsetof(struct vhost_user_inflight_split, used_idx), 14);
    CHECK_EQ(sizeof(struct vhost_user_inflight_chain), 16);
    CHECK_EQ(offsetof(struct vhost_user_inflight_chain, next), 6);
    CHECK_EQ(offsetof(struct vhost_user_inflight_chain, counter), 8);
    CHECK_EQ(vhost_inflight_size(1, 1, false), 64);
    CHECK_EQ(vhost_inflight_size(3, 4, false), 3 * 128);
    CHECK_EQ(vhost_inflight_size(2, 128, false), 2 * 2112);
}

static void the_layout_of_packed_queues(void)
{
    CHECK_EQ(sizeof(struct vhost_user_inflight_packed), 32);
    CHECK_EQ(offsetof(struct vhost_user_inflight_packed, free_head), 12);
    CHECK_EQ(offsetof(struct vhost_user_inflight_packed, used_idx), 16);
    CHECK_EQ(offsetof(struct vhost_user_inflight_packed, old_used_wrap_counter), 21);
    CHECK_EQ(sizeof(struct vhost_user_inflight_desc), 32);
    CHECK_EQ(offsetof(struct vhost_user_inflight_desc, next), 2);
    CHECK_EQ(offsetof(struct vhost_user_inflight_desc, counter), 8);
    CHECK_EQ(offsetof(struct vhost_user_inflight_desc, addr), 24);
    CHECK_EQ(vhost_inflight_size(1, 1, true), 64);
    CHECK_EQ(vhost_inflight_size(3, 4, true), 3 * 192);
}

static void each_queue_has_its_own_part(void)
{
    struct killed k;

    killed_open_sized(&k, SIZE, SIZE);
    vhost_device_free(&k.rig.probe->device);
    k.rig.probe = probe_new(3);
    struct vhost_queue_config config = driver_config(&k.rig.ring, 1);
    config.inflight = k.region;
    CHECK_EQ(vhost_queue_new(&config, &k.rig.probe->device, k.rig.guest.memory, &k.rig.queue), 0);
    queue_run(&k.rig.control, k.rig.queue);
    round_trip(&k.rig.ring, 3);
    CHECK_EQ(queue_halt(&k.rig.control, k.rig.queue), 1);
    struct vhost_user_inflight_split *second =
        (void *)(k.host + vhost_inflight_size(1, SIZE, false));
    CHECK_EQ(k.shared->version, 0);
    CHECK_EQ(second->version, 1);
    CHECK_EQ(second->desc_num, SIZE);
    CHECK_EQ(second->used_idx, 1);
    CHECK_EQ(second->last_batch_head, 3);
    /* The third has none, and runs without. */
    CHECK_EQ(vhost_queue_free(k.rig.queue), 0);
    config.index = 2;
    config.next_index = 1;
    CHECK_EQ(vhost_queue_new(&config, &k.rig.probe->device, k.rig.guest.memory, &k.rig.queue), 0);
    queue_run(&k.rig.control, k.rig.queue);
    round_trip(&k.rig.ring, 4);
    CHECK_EQ(queue_halt(&k.rig.control, k.rig.queue), 2);
    end(&k);
}

/* ---- what a running queue notes ---- */

static void what_is_out_is_noted(void)
{
    struct killed k;
    struct driver_ring *d = &k.rig.ring;

    killed_open_sized(&k, SIZE, SIZE);
    memset(k.chain, 0xff, SIZE * sizeof(*k.chain)); /* no version: nobody's flags */
    d->avail_idx = d->seen = d->avail[1] = d->used[1] = 0x5555;
    run(&k);
    atomic_store(&k.rig.probe->hold, true);
    driver_offer(d, 5);
    driver_offer(d, 2);
    driver_send(d, 7);
    while (probe_count(k.rig.probe) < 3)
        queue_sync(&k.rig.control, k.rig.queue);
    for (uint16_t i = 0; i < SIZE; i++)
        CHECK_EQ(flag(&k, i), i == 5 || i == 2 || i == 7);
    CHECK(k.chain[5].counter < k.chain[2].counter && k.chain[2].counter < k.chain[7].counter);
    CHECK_EQ(k.shared->version, 1);
    CHECK_EQ(k.shared->desc_num, SIZE);
    CHECK_EQ(k.shared->used_idx, 0x5555);
    CHECK_EQ(eventfd_write(k.rig.probe->release, 1), 0);
    driver_await_used(d, 3);
    CHECK_EQ(queue_halt(&k.rig.control, k.rig.queue), 0x5558);
    expect_idle(&k);
    CHECK_EQ(k.shared->last_batch_head, 7);
    CHECK_EQ(k.chain[7].next, 2);
    CHECK_EQ(k.chain[2].next, 5);
    end(&k);
}

/* A head that is pushed is the driver's when it is shown, and not before. */
static void a_head_twice_in_one_batch(void)
{
    struct killed k;

    killed_open(&k);
    driver_offer(&k.rig.ring, 3);
    driver_offer(&k.rig.ring, 3);
    driver_publish(&k.rig.ring);
    run(&k);
    CHECK_EQ(rig_await_fault(&k.rig), VHOST_FAULT_HEAD_BUSY);
    queue_halt(&k.rig.control, k.rig.queue);
    expect_idle(&k);
    end(&k);
}

/* ---- kills ---- */

enum step { COUNTER, FLAG, NEXT, LAST, SHOW, CLEAR, USED_IDX, OFFER };

struct store {
    enum step step;
    uint16_t head;
};

/* An earlier server, and its driver: nine chains of heads that come again, batches of two, one and
 * three, completed in another order. */
static const struct store life[] = {
    {OFFER, 5}, {OFFER, 2},   {OFFER, 7},    {COUNTER, 5}, {FLAG, 5},     {COUNTER, 2},
    {FLAG, 2},  {COUNTER, 7}, {FLAG, 7},     {NEXT, 7},    {LAST, 7},     {NEXT, 2},
    {LAST, 2},  {SHOW, 2},    {CLEAR, 7},    {CLEAR, 2},   {USED_IDX, 0}, {OFFER, 7},
    {OFFER, 0}, {COUNTER, 7}, {FLAG, 7},     {NEXT, 5},    {LAST, 5},     {SHOW, 1},
    {OFFER, 5}, {CLEAR, 5},   {USED_IDX, 0}, {COUNTER, 0}, {FLAG, 0},     {COUNTER, 5},
    {FLAG, 5},  {OFFER, 1},   {OFFER, 6},    {OFFER, 2},   {COUNTER, 1},  {FLAG, 1},
    {NEXT, 0},  {LAST, 0},    {NEXT, 1},     {LAST, 1},    {NEXT, 7},     {LAST, 7},
    {SHOW, 3},  {CLEAR, 0},   {CLEAR, 1},    {CLEAR, 7},   {USED_IDX, 0}, {COUNTER, 6},
    {FLAG, 6},
};

enum { LIFE = sizeof(life) / sizeof(life[0]), CHAINS = 9 };

/* What the driver has made available and not got back, in that order. */
struct owed {
    uint16_t head[CHAINS];
    uint32_t n;
};

static void owe(struct owed *o, uint16_t head)
{
    o->head[o->n++] = head;
}

static void repaid(struct owed *o, uint16_t head)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < o->n; i++) {
        if (o->head[i] != head)
            o->head[kept++] = o->head[i];
    }
    CHECK_EQ(kept, o->n - 1);
    o->n = kept;
}

static struct owed live(struct killed *k, uint32_t steps, uint64_t first_counter)
{
    struct driver_ring *d = &k->rig.ring;
    struct owed owed = {0};
    uint64_t counter = first_counter;
    uint16_t pushed[CHAINS];
    uint32_t num_pushed = 0;

    for (const struct store *s = life; s < life + steps; s++) {
        struct vhost_user_inflight_chain *c = &k->chain[s->head];
        switch (s->step) {
        case OFFER:
            driver_offer(d, s->head);
            owe(&owed, s->head);
            break;
        case COUNTER:
            c->counter = counter++;
            break;
        case FLAG:
            c->inflight = 1;
            break;
        case NEXT:
            c->next = k->shared->last_batch_head;
            break;
        case LAST:
            k->shared->last_batch_head = s->head;
            pushed[num_pushed++] = s->head;
            break;
        case SHOW:
            CHECK_EQ(num_pushed, s->head);
            while (num_pushed)
                repaid(&owed, pushed[--num_pushed]);
            d->used[1] += s->head;
            break;
        case CLEAR:
            c->inflight = 0;
            break;
        case USED_IDX:
            k->shared->used_idx = d->used[1];
        }
    }
    driver_publish(d);
    d->seen = d->used[1];
    return owed;
}

/* A new server completes what is owed, in order, once, and then new chains. */
static void expect_repaid(struct killed *k, const struct owed *owed)
{
    struct driver_ring *d = &k->rig.ring;

    for (uint32_t i = 0; i < owed->n; i++)
        CHECK_EQ(driver_take(d).id, owed->head[i]);
    CHECK_EQ(probe_count(k->rig.probe), owed->n);
    for (uint16_t head = 0; head < SIZE; head++)
        round_trip(d, head);
    CHECK_EQ(queue_halt(&k->rig.control, k->rig.queue), d->avail_idx);
    expect_idle(k);
    end(k);
}

static void a_kill_between_any_two_stores(void)
{
    for (uint32_t steps = 0; steps <= LIFE; steps++) {
        struct killed k;
        killed_open(&k);
        struct owed owed = live(&k, steps, 0);
        run(&k);
        expect_repaid(&k, &owed);
    }
}

static void indexes_that_wrap(void)
{
    for (uint32_t steps = 0; steps <= LIFE; steps++) {
        struct killed k;
        killed_open(&k);
        struct driver_ring *d = &k.rig.ring;
        d->avail_idx = d->seen = d->avail[1] = d->used[1] = k.shared->used_idx = 65535;
        struct owed owed = live(&k, steps, UINT64_C(0xffffffffffffff00));
        run(&k);
        expect_repaid(&k, &owed);
    }
}

/* Killed again with a part of it popped, and again, while the next is made out of it. */
static void killed_again_and_again(void)
{
    struct killed k;
    struct rig *r = &k.rig;

    killed_open(&k);
    struct owed owed = live(&k, LIFE, 0);
    for (int i = 0; i < 3; i++) {
        /* Not started, or with nothing served: as if it had been killed there. */
        CHECK_EQ(revive(&k, false), 0);
        if (i) {
            queue_run(&r->control, r->queue);
            CHECK_EQ(queue_halt(&r->control, r->queue), r->ring.avail_idx - 1);
        }
        CHECK_EQ(vhost_queue_free(r->queue), 0);
    }
    run(&k);
    expect_repaid(&k, &owed);
}

static void the_order_is_that_of_the_counters(void)
{
    static const uint64_t counter[SIZE] = {7, 1, UINT64_MAX, 3, 1u << 31, 0, UINT64_MAX - 1, 2};
    static const uint16_t order[SIZE] = {5, 1, 7, 3, 0, 4, 6, 2};
    struct killed k;

    killed_open(&k);
    for (uint16_t i = 0; i < SIZE; i++) {
        k.chain[i] = (struct vhost_user_inflight_chain){.inflight = 1, .counter = counter[i]};
        driver_offer(&k.rig.ring, i);
    }
    driver_publish(&k.rig.ring);
    run(&k);
    for (uint16_t i = 0; i < SIZE; i++)
        CHECK_EQ(driver_take(&k.rig.ring).id, order[i]);
    queue_halt(&k.rig.control, k.rig.queue);
    expect_idle(&k);
    end(&k);
}

/* Old chains keep their counters, new ones have later ones. */
static void new_chains_are_later(void)
{
    struct killed k;

    killed_open(&k);
    k.chain[4] = (struct vhost_user_inflight_chain){.inflight = 1, .counter = 1000};
    driver_offer(&k.rig.ring, 4);
    driver_offer(&k.rig.ring, 6);
    driver_publish(&k.rig.ring);
    atomic_store(&k.rig.probe->hold, true);
    run(&k);
    while (probe_count(k.rig.probe) < 2)
        queue_sync(&k.rig.control, k.rig.queue);
    CHECK_EQ(k.chain[4].counter, 1000);
    CHECK_EQ(k.chain[6].counter, 1001);
    CHECK_EQ(eventfd_write(k.rig.probe->release, 1), 0);
    driver_await_used(&k.rig.ring, 2);
    queue_halt(&k.rig.control, k.rig.queue);
    end(&k);
}

/* Shown by one that was killed before it called: the driver must not wait for ever. */
static void the_driver_is_called_at_the_start(void)
{
    struct killed k;

    killed_open(&k);
    live(&k, 14, 0);
    k.rig.ring.avail_idx = k.rig.ring.avail[1] = k.rig.ring.used[1];
    memset(k.chain, 0, SIZE * sizeof(*k.chain));
    k.shared->used_idx = k.rig.ring.used[1];
    run(&k);
    CHECK_EQ(take_signals(k.rig.ring.call), 1);
    queue_halt(&k.rig.control, k.rig.queue);
    end(&k);
}

/* Its answer counts what is owed as popped, so it must be done. */
static void a_stop_right_behind_the_start(void)
{
    struct killed k;
    struct rig *r = &k.rig;

    killed_open(&k);
    struct owed owed = live(&k, LIFE, 0);
    CHECK_EQ(revive(&k, true), 0);
    uint64_t start = ++r->control.token;
    CHECK_EQ(vhost_queue_start(r->queue, r->control.thread, start), 0);
    uint16_t next = queue_halt(&r->control, r->queue);
    CHECK_EQ(await_event(&r->control, VHOST_EVENT_DONE, start).result, 0);
    CHECK(next == r->ring.avail_idx || next == r->ring.avail_idx - 1);
    CHECK_EQ(r->ring.used[1], next);
    for (uint32_t i = 0; i < owed.n - (r->ring.avail_idx - next); i++)
        CHECK_EQ(driver_take(&r->ring).id, owed.head[i]);
    expect_idle(&k);
    end(&k);
}

static const struct test tests[] = {
    TEST(the_layout),
    TEST(the_layout_of_packed_queues),
    TEST(each_queue_has_its_own_part),
    TEST(what_is_out_is_noted),
    TEST(a_head_twice_in_one_batch),
    TEST(a_kill_between_any_two_stores),
    TEST(indexes_that_wrap),
    TEST(killed_again_and_again),
    TEST(the_order_is_that_of_the_counters),
    TEST(new_chains_are_later),
    TEST(the_driver_is_called_at_the_start),
    TEST(a_stop_right_behind_the_start),
};
MAIN(tests)
