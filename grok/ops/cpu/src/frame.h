// What XLA hands to a kernel: buffers, attributes, and its own threads. The header is that of the
// jaxlib that is installed.
#pragma once

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#define PIECE_BYTES (1 << 18)

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

static void help(void *data) {
  take_chunks(data);
  leave(data);
}

// Threads for work that reads so many bytes: the caller's, and one of XLA's for each piece that
// takes longer to read than a thread to wake.
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
    // Without an error: the pool is there, since it gave its size.
    if (frame->api->XLA_FFI_ThreadPool_Schedule(&args)) abort();
  }
  take_chunks(region);
  for (int spins = 0; atomic_load_explicit(&region->done, memory_order_acquire) < count; spins++) {
    if (spins > 2000) sched_yield();
  }
  leave(region);
}
