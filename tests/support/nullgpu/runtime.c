// The CUDA runtime of a card that has memory and computes nothing.
// Its memory is the computer's own, mapped but untouched until somebody writes to it, and counted against a limit.
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cuda_runtime_api.h>

#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)
#define PAGE (2 * MIB)
#define CONTEXT (450 * MIB) // what a driver keeps for itself
#define SMALL ((size_t)1 << 16)
#define MIDDLE ((size_t)1 << 25)

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static size_t total(void) {
    const char *text = getenv("NULL_GPU_GIB");
    return (size_t)((text ? atof(text) : 24.0) * GIB);
}

static int capability(void) { return number("NULL_GPU_SM", 89); }

// What benchmarks/step_cost.py reads.
__attribute__((visibility("hidden"))) unsigned long launches = 0; // products.c counts here, too
static size_t used = 0, peak = 0, copied = 0, copied_back = 0;
unsigned long null_launches(void) { return launches; }
void null_launched(void) { launches++; } // driver.c
size_t null_peak(void) { return peak; }
size_t null_h2d(void) { return copied; }
size_t null_d2h(void) { return copied_back; }

// ---- which memory is whose

typedef struct { uintptr_t start; size_t bytes; } Piece;
typedef struct { Piece pieces[1 << 16]; int count; } Pieces;
static Pieces on_card, pinned;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last = cudaSuccess;

static cudaError_t failed(cudaError_t error) { return last = error; }

static void add(Pieces *all, void *start, size_t bytes) { all->pieces[all->count++] = (Piece){(uintptr_t)start, bytes}; }

static int find(Pieces *all, const void *place, size_t bytes) { // the piece that overlaps, or -1
    for (int i = 0; i < all->count; i++) {
        Piece piece = all->pieces[i];
        if ((uintptr_t)place < piece.start + piece.bytes && (uintptr_t)place + bytes > piece.start) return i;
    }
    return -1;
}

static size_t take(Pieces *all, void *start) { // its bytes, 0 where no piece begins there
    for (int i = 0; i < all->count; i++)
        if (all->pieces[i].start == (uintptr_t)start) {
            size_t bytes = all->pieces[i].bytes;
            all->pieces[i] = all->pieces[--all->count];
            return bytes;
        }
    return 0;
}

static int is_in(Pieces *all, const void *place) {
    pthread_mutex_lock(&lock);
    int found = find(all, place, 1) >= 0;
    pthread_mutex_unlock(&lock);
    return found;
}

static void *map(size_t bytes) {
    return mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

cudaError_t cudaMalloc(void **place, size_t bytes) {
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    pthread_mutex_lock(&lock);
    void *made = used + bytes + CONTEXT > total() ? MAP_FAILED : map(bytes);
    if (made != MAP_FAILED) {
        add(&on_card, made, bytes);
        used += bytes;
        peak = used > peak ? used : peak;
        *place = made;
    }
    pthread_mutex_unlock(&lock);
    return made == MAP_FAILED ? failed(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFree(void *place) {
    pthread_mutex_lock(&lock);
    size_t bytes = take(&on_card, place);
    used -= bytes;
    if (bytes) munmap(place, bytes);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *all) {
    *all = total();
    *available = total() - used - CONTEXT;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **place, size_t bytes, unsigned flags) {
    void *made = map(bytes);
    if (made == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
    pthread_mutex_lock(&lock);
    add(&pinned, *place = made, bytes);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *place) {
    pthread_mutex_lock(&lock);
    size_t bytes = take(&pinned, place);
    if (bytes) munmap(place, bytes);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *place, size_t bytes, unsigned flags) {
    pthread_mutex_lock(&lock);
    int taken = find(&pinned, place, bytes) >= 0;
    if (!taken) add(&pinned, place, bytes);
    pthread_mutex_unlock(&lock);
    return taken ? failed(cudaErrorHostMemoryAlreadyRegistered) : cudaSuccess;
}

cudaError_t cudaHostUnregister(void *place) {
    pthread_mutex_lock(&lock);
    size_t bytes = take(&pinned, place);
    pthread_mutex_unlock(&lock);
    return bytes ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *place) {
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeUnregistered;
    if (is_in(&on_card, place)) {
        found->type = cudaMemoryTypeDevice;
        found->devicePointer = (void *)place;
    } else if (is_in(&pinned, place)) {
        found->type = cudaMemoryTypeHost;
        found->hostPointer = found->devicePointer = (void *)place;
    }
    return cudaSuccess;
}

// Small copies are made, so that a number put on the card is read back from it; what is larger comes back as zeros, up
// to what a LoRA's factor has, and beyond that is counted alone.
static cudaError_t copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDefault) {
        int target = is_in(&on_card, to);
        kind = is_in(&on_card, from) ? (target ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost)
                                     : (target ? cudaMemcpyHostToDevice : cudaMemcpyHostToHost);
    }
    if (kind == cudaMemcpyHostToDevice) copied += bytes;
    if (kind == cudaMemcpyDeviceToHost) copied_back += bytes;
    if (kind == cudaMemcpyHostToHost || (kind != cudaMemcpyDeviceToDevice && bytes <= SMALL)) memcpy(to, from, bytes);
    else if (kind == cudaMemcpyDeviceToHost && bytes <= MIDDLE) memset(to, 0, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes, kind);
}

cudaError_t cudaGetSymbolAddress(void **place, const void *symbol) {
    static char room[MIB];
    *place = room;
    return cudaSuccess;
}

// ---- the card

static int shared_memory(void) { return capability() == 89 ? 101376 : 232448; }
static int threads(void) { return capability() == 89 ? 1536 : 2048; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *card, int device) {
    memset(card, 0, sizeof *card);
    strcpy(card->name, "Null GPU");
    card->totalGlobalMem = total();
    card->major = capability() / 10;
    card->minor = capability() % 10;
    card->multiProcessorCount = 128;
    card->warpSize = 32;
    card->maxThreadsPerBlock = 1024;
    card->maxThreadsPerMultiProcessor = threads();
    card->maxBlocksPerMultiProcessor = 24;
    card->maxThreadsDim[0] = card->maxThreadsDim[1] = 1024;
    card->maxThreadsDim[2] = 64;
    card->maxGridSize[0] = 2147483647;
    card->maxGridSize[1] = card->maxGridSize[2] = 65535;
    card->sharedMemPerBlock = 49152;
    card->sharedMemPerBlockOptin = shared_memory();
    card->sharedMemPerMultiprocessor = shared_memory() + 1024;
    card->regsPerBlock = card->regsPerMultiprocessor = 65536;
    card->totalConstMem = 65536;
    card->l2CacheSize = 72 << 20;
    card->textureAlignment = 512;
    card->memoryBusWidth = 384;
    card->asyncEngineCount = 2;
    card->unifiedAddressing = card->concurrentKernels = card->canMapHostMemory = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 128; break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_memory(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_memory() + 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = threads(); break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 24; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, length, "0000:01:00.0");
    return cudaSuccess;
}
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }

// ---- streams and events: numbers, since whatever is asked for is done at once

static uintptr_t handle(void) {
    static uintptr_t given = 16;
    return __sync_add_and_fetch(&given, 16);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = (cudaStream_t)handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreate(stream);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    if (status) *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = (cudaEvent_t)handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t work, void *argument) {
    work(argument);
    return cudaSuccess;
}

// ---- kernels: counted, not run

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    launches++;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    launches++;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    launches++;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return cudaSuccess; }
void *__cudaRegisterFatBinary(void *binary) {
    static int handle;
    return &handle;
}

// What `kernel<<<grid, block, shared, stream>>>` leaves for the launch that follows.
typedef struct { dim3 grid, block; size_t shared; void *stream; } Call;
static __thread Call calls[8];
static __thread unsigned depth = 0;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    calls[depth++ % 8] = (Call){grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    Call call = calls[--depth % 8];
    *grid = call.grid;
    *block = call.block;
    *shared = call.shared;
    *(void **)stream = call.stream;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->ptxVersion = found->binaryVersion = capability();
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

static int driver_function(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **place, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *place = (void *)driver_function;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
