// SPDX-License-Identifier: Apache-2.0
// Calls of the system that fail on purpose: a library for LD_PRELOAD, which stands before libc's functions.
//
// It counts the calls of each kind on paths below a folder in the process that called arm(), writes each to a log, and
// does something else than the call at one of them, or from one of them on. Not seen: what libc itself does inside of
// its functions (fwrite's writes), what programs do that are started, and io_uring.
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { OPEN, READ, WRITE, SYNC, CLOSE, RENAME, LINK, UNLINK, RMDIR, MKDIR, TRUNCATE, CALLS };
static const char *const NAMES[] = {"open", "read", "write", "fsync", "close", "rename",
                                    "link", "unlink", "rmdir", "mkdir", "truncate"};
enum action { NOTHING, FAIL, FAIL_AFTER, SHORT, KILL, KILL_AFTER };

static struct {
    volatile pid_t process;
    char folder[PATH_MAX];
    size_t length;
    int log, call, action, error, lasting;
    long position, counts[CALLS];
} plan;

// From now on, in this process alone. Position: of the call among those of its kind, from 1.
void arm(const char *folder, int log, const char *call, long position, int action, int error, int lasting) {
    memset(&plan, 0, sizeof plan);
    strncpy(plan.folder, folder, PATH_MAX - 1);
    plan.length = strlen(plan.folder);
    plan.log = log, plan.action = action, plan.error = error, plan.lasting = lasting, plan.position = position;
    for (plan.call = 0; plan.call < CALLS && strcmp(NAMES[plan.call], call); plan.call++) {}
    plan.process = getpid();
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

// The path of a name below an open folder, or of the descriptor itself where there is no name.
static void resolve(int descriptor, const char *name, char *path) {
    path[0] = 0;
    if (name && name[0] == '/') {
        strncpy(path, name, PATH_MAX - 1), path[PATH_MAX - 1] = 0;
        return;
    }
    char link[64];
    if (descriptor == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    if (name) {
        size_t at = strlen(path);
        snprintf(path + at, PATH_MAX - at, "/%s", name);
    }
}

static enum action met(enum call call, int descriptor, const char *name) {
    if (!plan.process || plan.process != getpid()) return NOTHING;
    int before = errno;
    char path[PATH_MAX];
    resolve(descriptor, name, path);
    enum action action = NOTHING;
    if (!strncmp(path, plan.folder, plan.length) && (path[plan.length] == '/' || !path[plan.length])) {
        long number = __atomic_add_fetch(&plan.counts[call], 1, __ATOMIC_SEQ_CST);
        if (call == (enum call)plan.call && (plan.lasting ? number >= plan.position : number == plan.position))
            action = plan.action;
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s%s %s\n", action ? "! " : "", NAMES[call], path + plan.length);
        syscall(SYS_write, plan.log, line, size);
        if (action == KILL) die();
    }
    errno = before;
    return action;
}

#define NEXT(function) ((__typeof__(&function))dlsym(RTLD_NEXT, #function))
#define DO(call, descriptor, name, function, ...)                         \
    enum action action = met(call, descriptor, name);                     \
    if (action == FAIL && (call) != CLOSE) return errno = plan.error, -1;   \
    __auto_type result = NEXT(function)(__VA_ARGS__);                     \
    if (action == KILL_AFTER) die();                                      \
    if (action == FAIL || action == FAIL_AFTER) return errno = plan.error, -1; \
    return result
// A failed open leaves no descriptor.
#define OPENED(descriptor, name, function, ...)                           \
    va_list more;                                                         \
    va_start(more, flags);                                                \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more);                                                         \
    enum action action = met(OPEN, descriptor, name);                     \
    if (action == FAIL) return errno = plan.error, -1;                    \
    int result = NEXT(function)(__VA_ARGS__, mode);                       \
    if (action == KILL_AFTER) die();                                      \
    if (action == FAIL_AFTER && result >= 0) return syscall(SYS_close, result), errno = plan.error, -1; \
    return result

int open(const char *path, int flags, ...) { OPENED(AT_FDCWD, path, open, path, flags); }
int open64(const char *path, int flags, ...) { OPENED(AT_FDCWD, path, open64, path, flags); }
int openat(int at, const char *path, int flags, ...) { OPENED(at, path, openat, at, path, flags); }
int openat64(int at, const char *path, int flags, ...) { OPENED(at, path, openat64, at, path, flags); }
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int at, const char *path, int flags) { return openat(at, path, flags); }
int __openat64_2(int at, const char *path, int flags) { return openat64(at, path, flags); }
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define LESS(size) (action == SHORT && (size) > 1 ? (size) / 2 : (size))
ssize_t read(int file, void *data, size_t size) {
    enum action action = met(READ, file, NULL);
    if (action == FAIL) return errno = plan.error, -1;
    ssize_t result = NEXT(read)(file, data, LESS(size));
    if (action == KILL_AFTER) die();
    return action == FAIL_AFTER ? (errno = plan.error, -1) : result;
}
ssize_t write(int file, const void *data, size_t size) {
    enum action action = met(WRITE, file, NULL);
    if (action == FAIL) return errno = plan.error, -1;
    ssize_t result = NEXT(write)(file, data, LESS(size));
    if (action == KILL_AFTER) die();
    return action == FAIL_AFTER ? (errno = plan.error, -1) : result;
}
ssize_t pread(int f, void *d, size_t n, off_t o) { DO(READ, f, NULL, pread, f, d, n, o); }
ssize_t pread64(int f, void *d, size_t n, off64_t o) { DO(READ, f, NULL, pread64, f, d, n, o); }
ssize_t pwrite(int f, const void *d, size_t n, off_t o) { DO(WRITE, f, NULL, pwrite, f, d, LESS(n), o); }
ssize_t pwrite64(int f, const void *d, size_t n, off64_t o) { DO(WRITE, f, NULL, pwrite64, f, d, LESS(n), o); }
ssize_t writev(int f, const struct iovec *v, int n) { DO(WRITE, f, NULL, writev, f, v, LESS(n)); }
int fsync(int f) { DO(SYNC, f, NULL, fsync, f); }
int fdatasync(int f) { DO(SYNC, f, NULL, fdatasync, f); }
int close(int f) { DO(CLOSE, f, NULL, close, f); }
// Of two paths, the new one tells what is meant.
int rename(const char *a, const char *b) { DO(RENAME, AT_FDCWD, b, rename, a, b); }
int renameat(int x, const char *a, int y, const char *b) { DO(RENAME, y, b, renameat, x, a, y, b); }
int renameat2(int x, const char *a, int y, const char *b, unsigned f) { DO(RENAME, y, b, renameat2, x, a, y, b, f); }
int link(const char *a, const char *b) { DO(LINK, AT_FDCWD, b, link, a, b); }
int linkat(int x, const char *a, int y, const char *b, int f) { DO(LINK, y, b, linkat, x, a, y, b, f); }
int unlink(const char *p) { DO(UNLINK, AT_FDCWD, p, unlink, p); }
int remove(const char *p) { DO(UNLINK, AT_FDCWD, p, remove, p); }
int unlinkat(int at, const char *p, int f) { DO((f & AT_REMOVEDIR) ? RMDIR : UNLINK, at, p, unlinkat, at, p, f); }
int rmdir(const char *p) { DO(RMDIR, AT_FDCWD, p, rmdir, p); }
int mkdir(const char *p, mode_t m) { DO(MKDIR, AT_FDCWD, p, mkdir, p, m); }
int mkdirat(int at, const char *p, mode_t m) { DO(MKDIR, at, p, mkdirat, at, p, m); }
int truncate(const char *p, off_t n) { DO(TRUNCATE, AT_FDCWD, p, truncate, p, n); }
int ftruncate(int f, off_t n) { DO(TRUNCATE, f, NULL, ftruncate, f, n); }
int ftruncate64(int f, off64_t n) { DO(TRUNCATE, f, NULL, ftruncate64, f, n); }
int posix_fallocate(int f, off_t o, off_t n) {
    enum action action = met(TRUNCATE, f, NULL);
    return action == FAIL ? plan.error : NEXT(posix_fallocate)(f, o, n);
}
