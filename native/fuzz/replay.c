/*
 * Runs inputs that are kept, each a file: for compilers without a fuzzer, and to look at one.
 */
#include "guest.h"

int main(int argc, char **argv)
{
    static uint8_t data[1 << 20];

    for (int i = 1; i < argc; i++) {
        int fd = open(argv[i], O_RDONLY | O_CLOEXEC);
        running_test = argv[i];
        CHECK(fd >= 0);
        ssize_t len = read(fd, data, sizeof(data));
        CHECK(len >= 0);
        close(fd);
        LLVMFuzzerTestOneInput(data, (size_t)len);
    }
    printf("ok - %d inputs\n", argc - 1);
    return 0;
}
