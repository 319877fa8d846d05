/*
 * The packet generator: what two guests do that send frames to each other, without the guests.
 *
 * It measures servers that move tens of millions of frames a second, so a frame costs it a stamp,
 * a ring entry, and a look at each when it comes back; barriers, the clock, and the decision to
 * kick are paid once a batch.  A latency is therefore the time from the batch that sent a frame
 * to the batch that saw it arrive.
 *
 * A stamp stands behind the header that the port's frames start with:
 *
 *   | virtio-net header | Ethernet, IP...: the port's header | stamp | pattern, with VERIFY |
 *                                                              tag, sequence, time sent
 *
 * The tag is made of the run, the direction and the sequence number, so frames of others, of
 * earlier runs, and of this run where they do not belong are told apart.  What is in flight is a
 * table of the times sent, indexed by the sequence number.  A frame that arrives is one in flight
 * if its entry holds the time that its stamp has; it is taken out then, so that the same frame
 * can come again, late, or out of order without being counted twice.  Numbers whose entries are
 * taken are skipped; so a lost frame that blocks its entry until its time is up holds up nobody.
 *
 * The loop: take what arrived (and, in a round trip, send it back at the far end), take back the
 * slots of what was sent, send, and wait if there was nothing to do.
 */
#include "net_driver.h"
#include "cpu.h"
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>

enum {
    OPEN_FLIGHT = 65536,  /* entries where the depth is not limited: more than rings can hold */
    TICKS = 8,            /* looks at the clock's limits, a limit */
    SPINS_PER_LOOK = 128, /* at the clock */
};

/* ---- limits of time ---- */

static int check_stall(struct run *run, struct end *e)
{
    struct vhost_packet_port *p = e->port;
    int err = port_reclaim(p);

    if (p->tx.used_idx != e->tx_seen || !driver_ring_in_flight(&p->tx))
        e->tx_moved_ns = run->now;
    e->tx_seen = p->tx.used_idx;
    if (err >= 0 && run->config->stall_ms &&
        run->now - e->tx_moved_ns > run->config->stall_ms * 1000000ull)
        return -ETIMEDOUT;
    return err < 0 ? err : 0;
}

static int tick(struct run *run)
{
    int err = 0;

    run->next_tick = run->now + run->tick_ns;
    /* Without a limit of depth nobody waits for the places of the lost before the end. */
    if (run->in_flight && (run->config->depth || !run->sending))
        frames_expire(run);
    for (uint32_t i = 0; i < run->ends && !err; i++)
        err = check_stall(run, &run->end[i]);
    return err;
}

/* ---- waiting ---- */

/* Whether this end waits for the slots of what it sent. */
static inline bool waits_for_tx(const struct run *run, const struct end *e)
{
    return driver_ring_in_flight(&e->port->tx) && (!e->port->tx_idle_count || !run->sending);
}

static inline bool has_arrivals(const struct end *e)
{
    uint16_t looked_at = (uint16_t)(e->rx_seen - e->port->rx.used_idx);

    return can_take(e) && driver_ring_pending(&e->port->rx) != looked_at;
}

static inline bool has_work(const struct run *run)
{
    for (uint32_t i = 0; i < run->ends; i++) {
        const struct end *e = &run->end[i];
        if (has_arrivals(e) || (waits_for_tx(run, e) && driver_ring_pending(&e->port->tx)))
            return true;
    }
    return false;
}

static void wait_spinning(struct run *run)
{
    for (uint32_t spins = 1; !has_work(run); spins++) {
        if (spins % SPINS_PER_LOOK == 0 && now_ns() >= run->next_tick)
            return;
        cpu_relax();
    }
}

/* Asks to be called for what is waited for, and sleeps until it comes or the next tick. */
static void wait_sleeping(struct run *run)
{
    struct pollfd fd[4];
    nfds_t n = 0;
    eventfd_t ignored;

    for (uint32_t i = 0; i < run->ends; i++) {
        struct end *e = &run->end[i];
        if (can_take(e)) {
            driver_ring_arm(&e->port->rx, e->rx_seen);
            fd[n++] = (struct pollfd){.fd = e->port->rx.call_fd, .events = POLLIN};
        }
        if (waits_for_tx(run, e)) {
            driver_ring_arm(&e->port->tx, e->port->tx.used_idx);
            fd[n++] = (struct pollfd){.fd = e->port->tx.call_fd, .events = POLLIN};
        }
    }
    /* The wishes must be visible before the used indexes are looked at for the last time. */
    atomic_thread_fence(memory_order_seq_cst);
    uint64_t now = now_ns();
    if (has_work(run) || now >= run->next_tick)
        return;
    struct timespec timeout = {.tv_sec = (time_t)((run->next_tick - now) / 1000000000u),
                               .tv_nsec = (long)((run->next_tick - now) % 1000000000u)};
    run->result->sleeps++;
    if (ppoll(fd, n, &timeout, NULL) <= 0)
        return;
    for (nfds_t i = 0; i < n; i++) {
        if (fd[i].revents & POLLIN)
            eventfd_read(fd[i].fd, &ignored);
    }
}

static void wait(struct run *run)
{
    if (run->config->flags & VHOST_PACKET_POLL)
        wait_spinning(run);
    else
        wait_sleeping(run);
}

/* ---- the run ---- */

/* Strictly forward: no two batches have the same time, which tells their frames apart. */
static inline void take_time(struct run *run)
{
    uint64_t now = now_ns();

    run->now = now > run->now ? now : run->now + 1;
    run->bucket_of = 0;
}

/* Takes what came, and the slots of what went.  How much, or -EPROTO. */
static int serve(struct run *run)
{
    int moved = 0;

    for (uint32_t i = 0; i < run->ends; i++) {
        struct vhost_packet_port *p = run->end[i].port;
        int n = 0;
        driver_ring_disarm(&p->rx);
        driver_ring_disarm(&p->tx);
        /* Slots can wait until they are needed: fewer looks, larger batches. */
        if (driver_ring_in_flight(&p->tx) && (p->tx_idle_count < BATCH || !run->sending))
            n = port_reclaim(p);
        if (n < 0)
            return n;
        moved += n;
        n = frames_receive(run, &run->end[i]);
        if (n < 0)
            return n;
        moved += n;
    }
    return moved;
}

static bool is_done(const struct run *run)
{
    bool idle = !run->sending && !run->in_flight;

    for (uint32_t i = 0; i < run->ends; i++)
        idle = idle && !driver_ring_in_flight(&run->end[i].port->tx);
    return idle;
}

static int drive(struct run *run)
{
    uint32_t depth = run->config->depth;
    /* While frames come in, sending waits until it pays. */
    uint32_t worthwhile = depth && depth / 4 < BATCH ? depth / 4 : BATCH;

    for (;;) {
        uint64_t received = run->result->received;
        take_time(run);
        run->sending = run->result->sent < run->packets && run->now < run->end_ns;
        int moved = serve(run);
        int err = moved < 0 ? moved : run->now >= run->next_tick ? tick(run) : 0;
        if (err)
            return err;
        uint32_t n = run->sending ? frames_credit(run) : 0;
        if (n && (n >= worthwhile || run->result->received == received))
            frames_send(run, n);
        else if (is_done(run))
            return 0;
        else if (!moved)
            wait(run);
    }
}

static bool is_valid(const struct vhost_packet_config *c)
{
    const uint32_t flags = VHOST_PACKET_POLL | VHOST_PACKET_VERIFY | VHOST_PACKET_ROUND_TRIP;
    const struct vhost_packet_port *port[] = {c->port_a, c->port_b};

    if (!c->port_a || !c->port_b || c->flags & ~flags || c->packet_size < VHOST_PACKET_MIN ||
        c->packet_size > VHOST_PACKET_MAX || c->depth > VHOST_PACKET_DEPTH_MAX || !c->lost_ms ||
        (!c->packets && !c->duration_ns))
        return false;
    if (c->flags & VHOST_PACKET_ROUND_TRIP && c->port_a == c->port_b)
        return false;
    for (int i = 0; i < 2; i++) {
        const struct vhost_packet_port *p = port[i];
        uint32_t len = NET_HEADER_MAX + c->packet_size;
        /* Where they cannot be merged, one buffer must hold a frame (virtio 1.3, 5.1.6.3.1). */
        if (len > (p->mergeable ? (uint64_t)p->rx.size : 1) * p->rx_size)
            return false;
        if (len < p->prefix_len + VHOST_PACKET_STAMP)
            return false;
        if (!(c->flags & VHOST_PACKET_POLL) && (p->rx.call_fd < 0 || p->tx.call_fd < 0))
            return false;
    }
    return true;
}

static int end_open(struct run *run, struct end *e, struct vhost_packet_port *port,
                    const struct vhost_packet_port *peer)
{
    e->port = port;
    e->stamp_in = peer->prefix_len;
    e->tx_moved_ns = run->start_ns;
    port->rx.kicks = port->tx.kicks = 0;
    if (port->broken)
        return -EPROTO;
    int err = port_reclaim(port);
    if (err < 0)
        return err;
    if (driver_ring_in_flight(&port->tx))
        return -EBUSY;
    e->tx_seen = port->tx.used_idx;
    return port_prepare(port, run->config->packet_size);
}

static int run_open(struct run *run)
{
    const struct vhost_packet_config *c = run->config;
    struct end *a = &run->end[0], *b = &run->end[c->port_a != c->port_b];
    uint64_t entries = OPEN_FLIGHT;

    if (!is_valid(c))
        return -EINVAL;
    run->ends = c->port_a == c->port_b ? 1 : 2;
    run->start_ns = run->now = run->last_ns = now_ns();
    int err = end_open(run, b, c->port_b, c->port_a);
    if (!err && a != b)
        err = end_open(run, a, c->port_a, c->port_b);
    if (err)
        return err;
    b->bounces = c->flags & VHOST_PACKET_ROUND_TRIP;
    b->key_out = a->key_in = frames_key(c->seed, run->start_ns); /* of the way back */
    a->key_out = b->key_in = ~b->key_out;

    run->frame_len = NET_HEADER_MAX + c->packet_size;
    run->verify = c->flags & VHOST_PACKET_VERIFY;
    while (c->depth && entries / 4 >= c->depth)
        entries /= 2;
    run->flight_mask = (uint32_t)(entries - 1);
    run->flight = calloc(entries, sizeof(*run->flight));
    run->flat = malloc(run->frame_len);
    if (!run->flight || !run->flat)
        return -ENOMEM;
    run->packets = c->packets ? c->packets : UINT64_MAX;
    run->tick_ns =
        (c->stall_ms && c->stall_ms < c->lost_ms ? c->stall_ms : c->lost_ms) * (1000000ull / TICKS);
    return 0;
}

static int run_timed(struct run *run)
{
    uint64_t cpu = cpu_time_ns();

    run->start_ns = run->last_ns = now_ns();
    run->next_tick = run->start_ns + run->tick_ns;
    run->end_ns = run->config->duration_ns ? run->start_ns + run->config->duration_ns : UINT64_MAX;
    for (uint32_t i = 0; i < run->ends; i++) {
        run->end[i].tx_moved_ns = run->start_ns;
        port_publish_rx(run->end[i].port);
    }
    int err = drive(run);
    run->result->cpu_ns = cpu_time_ns() - cpu;
    run->result->elapsed_ns = run->last_ns - run->start_ns;
    for (uint32_t i = 0; i < run->ends; i++)
        run->result->kicks += run->end[i].port->rx.kicks + run->end[i].port->tx.kicks;
    return err;
}

int vhost_packet_run(const struct vhost_packet_config *config, struct vhost_packet_result *result)
{
    struct run run = {.config = config, .result = result};
    cpu_set_t before;

    *result = (struct vhost_packet_result){0};
    int err = run_open(&run);
    if (!err && config->cpu >= 0)
        err = sched_getaffinity(0, sizeof(before), &before) < 0 ? -errno : cpu_pin(config->cpu);
    if (!err) {
        err = run_timed(&run);
        if (config->cpu >= 0)
            sched_setaffinity(0, sizeof(before), &before);
    }
    free(run.flight);
    free(run.flat);
    return err;
}
