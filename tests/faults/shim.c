// Preloaded into a test's process: makes writes and syncs of chosen files fail, and keeps a journal of them.
//
// The process calls fault_arm(), fault_hits() and journal_*() itself; nothing happens before.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ONCE, LASTING, SHORT_WRITE };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char fault_part[PATH_MAX]; // of the path, "" for no fault
static long fault_countdown;
static int fault_errno, fault_mode, fault_n_hits;
static char journal_part[PATH_MAX];
static int journal_fd = -1;

// The nth write, truncation or sync from now on, of a file whose path contains part, fails with error; so do all behind
// it when mode is LASTING. With SHORT_WRITE it writes half of its bytes instead, and succeeds.
void fault_arm(const char *part, long nth, int error, int mode) {
    pthread_mutex_lock(&lock);
    snprintf(fault_part, sizeof fault_part, "%s", part);
    fault_countdown = nth;
    fault_errno = error;
    fault_mode = mode;
    fault_n_hits = 0;
    pthread_mutex_unlock(&lock);
}

// Ends the fault; its hits can still be asked for.
void fault_clear(void) {
    pthread_mutex_lock(&lock);
    fault_part[0] = 0;
    pthread_mutex_unlock(&lock);
}

// Calls that failed, or were cut short, since fault_arm().
int fault_hits(void) {
    return fault_n_hits;
}

// Appends every write, truncation, sync and unlink of files whose path contains part to a journal, as records:
// operation (4 bytes), length of the path (4), offset or size (8), length of the data (8), path, data.
void journal_start(const char *file, const char *part) {
    pthread_mutex_lock(&lock);
    snprintf(journal_part, sizeof journal_part, "%s", part);
    journal_fd = open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    pthread_mutex_unlock(&lock);
}

static void put(const void *data, size_t n) {
    while (n) {
        long done = syscall(SYS_write, journal_fd, data, n);
        if (done <= 0) return;
        data = (const char *)data + done;
        n -= (size_t)done;
    }
}

static void record(uint32_t op, const char *path, int64_t offset, const void *data, size_t n) {
    if (journal_fd < 0 || !strstr(path, journal_part)) return;
    uint32_t path_len = (uint32_t)strlen(path);
    int64_t length = (int64_t)n;
    put(&op, sizeof op);
    put(&path_len, sizeof path_len);
    put(&offset, sizeof offset);
    put(&length, sizeof length);
    put(path, path_len);
    if (n) put(data, n);
}

// Writes a line of the caller's into the journal.
void journal_note(const char *note) {
    pthread_mutex_lock(&lock);
    if (journal_fd >= 0) {
        char path[PATH_MAX * 2];
        snprintf(path, sizeof path, "%s", journal_part);
        record('N', path, 0, note, strlen(note));
    }
    pthread_mutex_unlock(&lock);
}

static void path_of(int fd, char path[PATH_MAX]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n > 0 ? n : 0] = 0;
}

// Whether this call is to go wrong.
static int strikes(const char *path) {
    if (!fault_part[0] || !strstr(path, fault_part)) return 0;
    if (fault_countdown > 0) fault_countdown--;
    if (fault_countdown > 0 || (fault_mode != LASTING && fault_n_hits > 0)) return 0;
    fault_n_hits++;
    return 1;
}

static ssize_t do_write(int fd, const void *data, size_t n, off64_t offset, int positioned) {
    int saved = errno;
    char path[PATH_MAX];
    pthread_mutex_lock(&lock);
    path_of(fd, path);
    ssize_t done = -1;
    if (strikes(path)) {
        if (fault_mode != SHORT_WRITE) {
            pthread_mutex_unlock(&lock);
            errno = fault_errno;
            return -1;
        }
        n = n > 1 ? n / 2 : n;
    }
    errno = saved;
    if (!positioned && journal_fd >= 0) offset = lseek64(fd, 0, SEEK_CUR);
    done = positioned ? syscall(SYS_pwrite64, fd, data, n, offset) : syscall(SYS_write, fd, data, n);
    saved = errno;
    if (done > 0) record('W', path, offset, data, (size_t)done);
    pthread_mutex_unlock(&lock);
    errno = saved;
    return done;
}

static int do_plain(int fd, long number, uint32_t op, off64_t size) {
    char path[PATH_MAX];
    pthread_mutex_lock(&lock);
    path_of(fd, path);
    if (strikes(path) && fault_mode != SHORT_WRITE) {
        pthread_mutex_unlock(&lock);
        errno = fault_errno;
        return -1;
    }
    int result = (int)syscall(number, fd, size);
    int saved = errno;
    if (result == 0) record(op, path, size, NULL, 0);
    pthread_mutex_unlock(&lock);
    errno = saved;
    return result;
}

ssize_t write(int fd, const void *data, size_t n) {
    return do_write(fd, data, n, 0, 0);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) {
    return do_write(fd, data, n, offset, 1);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t offset) {
    return do_write(fd, data, n, offset, 1);
}

int ftruncate(int fd, off_t size) {
    return do_plain(fd, SYS_ftruncate, 'T', size);
}

int ftruncate64(int fd, off64_t size) {
    return do_plain(fd, SYS_ftruncate, 'T', size);
}

int fsync(int fd) {
    return do_plain(fd, SYS_fsync, 'S', 0);
}

int fdatasync(int fd) {
    return do_plain(fd, SYS_fdatasync, 'S', 0);
}

int unlink(const char *path) {
    pthread_mutex_lock(&lock);
    int result = (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    int saved = errno;
    if (result == 0) record('U', path, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    errno = saved;
    return result;
}
