/* Runs of the packet generator over a wire, and what must come of them. */
#ifndef PACKET_RUN_H
#define PACKET_RUN_H

#include "wire.h"

static struct wire wire;
static struct vhost_packet_result result;

static inline struct vhost_packet_config load_of(struct wire *w, uint32_t flags)
{
    return (struct vhost_packet_config){
        .port_a = w->port[0].packet,
        .port_b = w->port[w->ports - 1].packet,
        .packets = 2000,
        .seed = 42,
        .packet_size = 128,
        .depth = 16,
        .lost_ms = PATIENCE_MS,
        .stall_ms = PATIENCE_MS,
        .flags = flags,
        .cpu = -1,
    };
}

/* Runs over the wire, which is cut afterwards. */
static inline int run(const struct vhost_packet_config *load)
{
    wire_start(&wire);
    int err = vhost_packet_run(load, &result);
    wire_halt(&wire);
    return err;
}

static inline uint64_t latencies(void)
{
    uint64_t n = 0;

    for (int i = 0; i < VHOST_HISTOGRAM_BUCKETS; i++)
        n += result.latency[i];
    return n;
}

/* What holds of every run that ends. */
static inline void check_sums(const struct vhost_packet_config *load)
{
    CHECK_EQ(result.sent, load->packets);
    CHECK_EQ(result.sent, result.received + result.lost);
    CHECK_EQ(latencies(), result.received - result.corrupt);
    CHECK_EQ(wire.bad_headers, 0);
    for (uint32_t i = 0; i < wire.ports; i++) {
        struct driver_ring *tx = &wire.port[i].ring[1];
        CHECK(tx->packed || driver_used_idx(tx) == tx->avail[1]);
    }
    CHECK(result.elapsed_ns > 0 && result.cpu_ns > 0);
}

static inline void check_perfect(const struct vhost_packet_config *load)
{
    check_sums(load);
    CHECK_EQ(result.received, load->packets);
    CHECK_EQ(result.bytes, load->packets * load->packet_size);
    CHECK_EQ(result.corrupt, 0);
    CHECK_EQ(result.stale, 0);
    CHECK_EQ(result.foreign, 0);
}

#endif
