/* A wall clock that a test can set: loaded into the programs before the C library, it adds the seconds in the file that it
 * finds at their start to CLOCK_REALTIME, and leaves the other clocks alone. The file is mapped, so that writing to it moves
 * the clock of processes that run, whatever they may still open. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int (*real)(clockid_t, struct timespec *);
static const volatile long long *shift;

__attribute__((constructor)) static void prepare(void)
{
    real = dlsym(RTLD_NEXT, "clock_gettime");
    int fd = open("/etc/clock-shift", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    void *mapped = mmap(NULL, sizeof *shift, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED)
        shift = mapped;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    if (!real)
        prepare();
    int result = real(clock, now);
    if (result == 0 && shift && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *shift;
    return result;
}

time_t time(time_t *seconds)
{
    struct timespec now = {0};
    clock_gettime(CLOCK_REALTIME, &now);
    if (seconds)
        *seconds = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise = {0};
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
