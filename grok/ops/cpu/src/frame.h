// What XLA hands to a kernel: buffers, attributes, and its own threads. The header is that of the
// jaxlib that is installed.
#pragma once

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "xla/ffi/api/c_api.h"

#define PIECE_BYTES (1 << 17)
#define MAX_WAITING 64        // threads of XLA
#define WAIT_NANOSECONDS 50000  // more than lies between two kernels of a step

static const XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *frame, int64_t index) {
  return frame->args.args[index];
}

static const XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *frame, int64_t index) {
  return frame->rets.rets[index];
}

static const void *attribute_of(const XLA_FFI_CallFrame *frame, const char *name) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    const XLA_FFI_ByteSpan *span = frame->attrs.names[i];
    if (span->len == strlen(name) && !memcmp(span->ptr, name, span->len)) {
      return ((const XLA_FFI_Scalar *)frame->attrs.attrs[i])->value;
    }
  }
  abort();
}

static int64_t attribute(const XLA_FFI_CallFrame *frame, const char *name) {
  return *(const int64_t *)attribute_of(frame, name);
}

static float float_attribute(const XLA_FFI_CallFrame *frame, const char *name) {
  return *(const float *)attribute_of(frame, name);
}

static XLA_FFI_Error *error_of(const XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message,
                                    .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

// True where XLA asks for the version of the interface, and not for the kernel to run.
static bool is_query(XLA_FFI_CallFrame *frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) {
    return false;
  }
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return true;
}

typedef void Chunk(void *work, int64_t index);

// Chunks of work that any thread may take next. The last to leave frees it.
typedef struct {
  atomic_llong next, done;
  atomic_int users;
  int64_t count;
  Chunk *run;
  void *work;
} Region;

// A thread of XLA that has finished its work and waits a moment for that of the next kernel: to
// wake one takes about as long as a small product. Its seat is in turn ABSENT, WAITING, a region to
// work at, and WAITING or ABSENT again.
typedef struct {
  _Alignas(64) _Atomic(Region *) region;
} Seat;

static Seat seats[MAX_WAITING];
static Region waiting;
#define ABSENT ((Region *)NULL)
#define WAITING (&waiting)

static void pause_thread(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void leave(Region *region) {
  if (atomic_fetch_sub(&region->users, 1) == 1) free(region);
}

static void take_chunks(Region *region) {
  int64_t index;
  while ((index = atomic_fetch_add(&region->next, 1)) < region->count) {
    region->run(region->work, index);
    atomic_fetch_add_explicit(&region->done, 1, memory_order_release);
  }
}

// A seat that nobody has, in which this thread now waits; NULL where there is none.
static Seat *take_seat(void) {
  for (int i = 0; i < MAX_WAITING; i++) {
    Region *absent = ABSENT;
    if (atomic_compare_exchange_strong(&seats[i].region, &absent, WAITING)) return &seats[i];
  }
  return NULL;
}

// The next region for the thread in this seat, which it has left then; NULL after a while.
static Region *await_region(Seat *seat) {
  for (int64_t end = nanoseconds() + WAIT_NANOSECONDS; nanoseconds() < end; pause_thread()) {
    if (atomic_load_explicit(&seat->region, memory_order_acquire) != WAITING) break;
  }
  Region *region = atomic_exchange(&seat->region, ABSENT);
  return region == WAITING ? NULL : region;
}

static void help(void *data) {
  for (Region *region = data; region;) {
    take_chunks(region);
    leave(region);
    Seat *seat = take_seat();
    region = seat ? await_region(seat) : NULL;
  }
}

// True where a thread was waiting, and now works at the region.
static bool call_waiting(Region *region) {
  for (int i = 0; i < MAX_WAITING; i++) {
    Region *expected = WAITING;
    if (atomic_load_explicit(&seats[i].region, memory_order_relaxed) == WAITING &&
        atomic_compare_exchange_strong(&seats[i].region, &expected, region)) {
      return true;
    }
  }
  return false;
}

// Threads for work that reads so many bytes: the caller's, and one of XLA's for each piece.
static int64_t num_threads(const XLA_FFI_CallFrame *frame, int64_t bytes) {
  int64_t count = 1, most = 1 + bytes / PIECE_BYTES;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .num_threads = &count};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (!error) return count < most ? count : most;
  XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE,
                                        .error = error};
  frame->api->XLA_FFI_Error_Destroy(&destroy);
  return 1;
}

// Runs run(work, 0), ..., run(work, count - 1) on the caller and on XLA's threads, at most
// `threads` of them; whoever is free takes the next. The caller waits for no thread that has not
// begun, so a pool whose threads are busy, or all wait here, cannot stop it.
static void run_chunks(const XLA_FFI_CallFrame *frame, int64_t threads, int64_t count, Chunk *run,
                       void *work) {
  int64_t helpers = (threads < count ? threads : count) - 1;
  Region *region = helpers > 0 ? malloc(sizeof *region) : NULL;
  if (!region) {
    for (int64_t index = 0; index < count; index++) run(work, index);
    return;
  }
  *region = (Region){.users = (int)helpers + 1, .count = count, .run = run, .work = work};
  XLA_FFI_ThreadPool_Schedule_Args args = {
      .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .task = help,
      .data = region};
  for (int64_t i = 0; i < helpers; i++) {
    if (call_waiting(region)) continue;
    // Without an error: the pool is there, since it gave its size.
    if (frame->api->XLA_FFI_ThreadPool_Schedule(&args)) abort();
  }
  take_chunks(region);
  for (int spins = 0; atomic_load_explicit(&region->done, memory_order_acquire) < count; spins++) {
    pause_thread();
    if (spins > 2000) sched_yield();
  }
  leave(region);
}
