/*
 * Packets of any form in both directions.  The wire is a socket pair, which keeps frames apart as
 * a tap does; what the guest is sent comes from its own memory.
 */
#include "guest.h"
#include <sys/socket.h>

enum { MERGEABLE = 1, FRAME_MAX = 9000 };

static struct guest guest;
static int wire[2];

static void between(struct guest *g, int turn)
{
    static char frame[FRAME_MAX];

    if (g->setup.queue % 2 == 0) {
        const uint16_t *word = (const uint16_t *)(const void *)g->host;
        size_t len = (size_t)(word[0x1800 / 2 + turn] % (FRAME_MAX - 12) + 12);
        memcpy(frame, g->host + 0x1000, len < MEMORY - 0x1000 ? len : MEMORY - 0x1000);
        (void)!write(wire[1], frame, len);
    }
    while (read(wire[1], frame, sizeof(frame)) >= 0)
        ;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct setup setup;

    if (!guest.device) {
        guest_open(&guest);
        CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, wire), 0);
        struct vhost_net_config config = {.tap_fds = wire, .num_pairs = 1};
        CHECK_EQ(vhost_net_new(&config, &guest.device), 0);
    }
    if (!guest_take(&data, &len, &setup))
        return 0;
    uint64_t mergeable = UINT64_C(1) << VIRTIO_NET_F_MRG_RXBUF;
    guest_run(&guest, &setup, data, len, setup.device & MERGEABLE ? mergeable : 0, between);
    return 0;
}
