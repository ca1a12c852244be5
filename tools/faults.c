/* A storage that fails on demand, preloaded under any process: the calls below are counted where they concern a path
 * that holds FAULT_PATH, and the FAULT_AT-th of them (one of FAULT_CALLS, if that is set) does what FAULT_KIND says:
 *
 *   EIO, ENOSPC, EROFS, EINTR...  fail with that error      short   transfer half of the bytes, at least one
 *   kill                          SIGKILL before the call   end     transfer nothing, as at the end of a file
 *   after                         SIGKILL behind it         stall   sleep FAULT_SECONDS, then go on
 *
 * With FAULT_FROM=1 every later call fails too: a disk that died. FAULT_LOG names a file that gets a line a call.
 * The environment is read at every call, so that a forked child can set its own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int count;
static const char *const NAMES[] = {"EIO", "ENOSPC", "EROFS", "EDQUOT", "ESTALE", "ENOMEM"};
static const int NUMBERS[] = {EIO, ENOSPC, EROFS, EDQUOT, ESTALE, ENOMEM};

enum outcome { GO_ON, FAIL, SHORT, END, DIE_AFTER };

static enum outcome decide(const char *call, const char *path) {
    const char *wanted = getenv("FAULT_PATH");
    if (!wanted || !path || !strstr(path, wanted)) return GO_ON;
    const char *calls = getenv("FAULT_CALLS");
    if (calls && *calls && !strstr(calls, call)) return GO_ON;
    int number = atomic_fetch_add(&count, 1) + 1;
    const char *log = getenv("FAULT_LOG");
    if (log && *log) {
        static int (*real_open)(const char *, int, ...);
        if (!real_open) real_open = dlsym(RTLD_NEXT, "open");
        static ssize_t (*real_write)(int, const void *, size_t);
        if (!real_write) real_write = dlsym(RTLD_NEXT, "write");
        int file = real_open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%d %s %s\n", number, call, path);
        if (file >= 0) {
            if (real_write(file, line, (size_t)length) < 0) abort();
            close(file);
        }
    }
    const char *at = getenv("FAULT_AT"), *kind = getenv("FAULT_KIND"), *from = getenv("FAULT_FROM");
    if (!at || !kind) return GO_ON;
    int place = atoi(at);
    if (number != place && !(from && *from == '1' && number > place)) return GO_ON;
    if (!strcmp(kind, "kill")) raise(SIGKILL);
    if (!strcmp(kind, "after")) return DIE_AFTER;
    if (!strcmp(kind, "short")) return SHORT;
    if (!strcmp(kind, "end")) return END;
    if (!strcmp(kind, "stall")) {
        const char *seconds = getenv("FAULT_SECONDS");
        sleep(seconds ? (unsigned)atoi(seconds) : 3600);
        return GO_ON;
    }
    for (size_t i = 0; i < sizeof NUMBERS / sizeof *NUMBERS; i++)
        if (!strcmp(kind, NAMES[i])) {
            errno = NUMBERS[i];
            return FAIL;
        }
    abort();
}

static const char *path_of(int descriptor, char *room) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, room, PATH_MAX - 1);
    if (length < 0) return NULL;
    room[length] = 0;
    return room;
}

#define REAL(type, name, ...)                                                \
    static type (*real)(__VA_ARGS__);                                        \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* After the call: die, or give its result. */
#define DONE(outcome, result)                                                \
    do {                                                                     \
        if ((outcome) == DIE_AFTER) raise(SIGKILL);                          \
        return (result);                                                     \
    } while (0)

#define TRANSFER(name, call, buffer, extra_types, extra)                     \
    ssize_t name(int descriptor, buffer data, size_t size extra_types) {     \
        REAL(ssize_t, name, int, buffer, size_t extra_types);                \
        char room[PATH_MAX];                                                 \
        int before = errno;                                                  \
        enum outcome outcome =                                               \
            getenv("FAULT_PATH") ? decide(call, path_of(descriptor, room)) : GO_ON; \
        if (outcome == FAIL) return -1;                                      \
        if (outcome == END) return 0;                                        \
        errno = before;                                                      \
        if (outcome == SHORT && size > 1) size /= 2;                         \
        ssize_t result = real(descriptor, data, size extra);                 \
        DONE(outcome, result);                                               \
    }

#define NOTHING
#define COMMA ,
TRANSFER(read, "read", void *, NOTHING, NOTHING)
TRANSFER(pread, "read", void *, COMMA off_t offset, COMMA offset)
TRANSFER(pread64, "read", void *, COMMA off64_t offset, COMMA offset)
TRANSFER(write, "write", const void *, NOTHING, NOTHING)
TRANSFER(pwrite, "write", const void *, COMMA off_t offset, COMMA offset)
TRANSFER(pwrite64, "write", const void *, COMMA off64_t offset, COMMA offset)

#define VECTORED(name, extra_types, extra)                                   \
    ssize_t name(int descriptor, const struct iovec *parts, int n, off64_t offset extra_types) { \
        REAL(ssize_t, name, int, const struct iovec *, int, off64_t extra_types); \
        char room[PATH_MAX];                                                 \
        int before = errno;                                                  \
        enum outcome outcome =                                               \
            getenv("FAULT_PATH") ? decide("read", path_of(descriptor, room)) : GO_ON; \
        if (outcome == FAIL) return -1;                                      \
        if (outcome == END) return 0;                                        \
        errno = before;                                                      \
        if (outcome == SHORT && n > 0) {                                     \
            struct iovec half = parts[0];                                    \
            if (half.iov_len > 1) half.iov_len /= 2;                         \
            return real(descriptor, &half, 1, offset extra);                 \
        }                                                                    \
        ssize_t result = real(descriptor, parts, n, offset extra);           \
        DONE(outcome, result);                                               \
    }
VECTORED(preadv, NOTHING, NOTHING)
VECTORED(preadv64, NOTHING, NOTHING)
VECTORED(preadv2, COMMA int flags, COMMA flags)
VECTORED(preadv64v2, COMMA int flags, COMMA flags)

#define OPEN(name, first_types, first)                                       \
    int name(first_types const char *path, int flags, ...) {                 \
        REAL(int, name, first_types const char *, int, ...);                 \
        va_list rest;                                                        \
        va_start(rest, flags);                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                        \
        int before = errno;                                                  \
        enum outcome outcome = decide("open", path);                         \
        if (outcome == FAIL) return -1;                                      \
        errno = before;                                                      \
        int result = real(first path, flags, mode);                          \
        DONE(outcome, result);                                               \
    }
OPEN(open, NOTHING, NOTHING)
OPEN(open64, NOTHING, NOTHING)
OPEN(openat, int folder COMMA, folder COMMA)
OPEN(openat64, int folder COMMA, folder COMMA)

#define ON_DESCRIPTOR(name)                                                  \
    int name(int descriptor) {                                               \
        REAL(int, name, int);                                                \
        char room[PATH_MAX];                                                 \
        enum outcome outcome =                                               \
            getenv("FAULT_PATH") ? decide(#name, path_of(descriptor, room)) : GO_ON; \
        if (outcome == FAIL) return -1;                                      \
        int result = real(descriptor);                                       \
        DONE(outcome, result);                                               \
    }
ON_DESCRIPTOR(fsync)
ON_DESCRIPTOR(fdatasync)

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    enum outcome outcome = decide("rename", to);
    if (outcome == FAIL) return -1;
    int result = real(from, to);
    DONE(outcome, result);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    enum outcome outcome = decide("rename", to);
    if (outcome == FAIL) return -1;
    int result = real(a, from, b, to);
    DONE(outcome, result);
}

int unlink(const char *path) {
    REAL(int, unlink, const char *);
    enum outcome outcome = decide("unlink", path);
    if (outcome == FAIL) return -1;
    int result = real(path);
    DONE(outcome, result);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    enum outcome outcome = decide("unlink", path);
    if (outcome == FAIL) return -1;
    int result = real(folder, path, flags);
    DONE(outcome, result);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    enum outcome outcome = decide("mkdir", path);
    if (outcome == FAIL) return -1;
    int result = real(path, mode);
    DONE(outcome, result);
}

int fchmod(int descriptor, mode_t mode) {
    REAL(int, fchmod, int, mode_t);
    char room[PATH_MAX];
    enum outcome outcome = getenv("FAULT_PATH") ? decide("fchmod", path_of(descriptor, room)) : GO_ON;
    if (outcome == FAIL) return -1;
    int result = real(descriptor, mode);
    DONE(outcome, result);
}
