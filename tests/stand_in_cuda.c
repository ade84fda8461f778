/* A stand-in for CUDA's runtime and driver: one device of compute capability 9.0 whose memory is the host's and whose
   kernels do nothing. PyTorch, unmodified, then takes the decisions that it takes on a GPU. */
#include <stdlib.h>
#include <string.h>
#include "driver_types.h"

typedef struct { unsigned x, y, z; } dim;
static char handle;

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13020; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13020; return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *is, int device) {
  memset(is, 0, sizeof *is);
  strcpy(is->name, "a GPU");
  is->major = 9;
  is->totalGlobalMem = 1ULL << 34;
  is->multiProcessorCount = 100;
  is->warpSize = 32;
  is->maxThreadsPerBlock = 1024;
  is->maxThreadsPerMultiProcessor = 2048;
  is->sharedMemPerBlock = 49152;
  is->sharedMemPerBlockOptin = 232448;
  is->regsPerMultiprocessor = 65536;
  is->maxGridSize[0] = 2147483647;
  is->maxGridSize[1] = is->maxGridSize[2] = 65535;
  is->maxThreadsDim[0] = is->maxThreadsDim[1] = 1024;
  is->maxThreadsDim[2] = 64;
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return 0; }
int cudaMalloc(void **memory, size_t size) { return posix_memalign(memory, 512, size); }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { return posix_memalign(memory, 512, size); }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 1ULL << 34; return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { memcpy(to, from, size); return 0; }
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { memset(to, value, size); return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -1; return 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { *stream = &handle; return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamQuery(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status, void *a, void *b, void *c, void *d, void *e) { *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = &handle; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaLaunchKernel(const void *kernel, dim grid, dim block, void **arguments, size_t shared, void *stream) { return 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *kernel) {
  memset(of, 0, sizeof *of);
  of->maxThreadsPerBlock = 1024;
  return 0;
}
int cudaFuncSetAttribute(const void *kernel, int attribute, int value) { return 0; }
int cudaLaunchKernelExC(const void *config, const void *kernel, void **arguments) { return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int size, size_t shared) {
  *blocks = 2;
  return 0;
}
int __cudaPushCallConfiguration(dim grid, dim block, size_t shared, void *stream) { return 0; }
int __cudaPopCallConfiguration(void *grid, void *block, void *shared, void *stream) {
  memset(grid, 0, 12);
  memset(block, 0, 12);
  memset(shared, 0, 8);
  memset(stream, 0, 8);
  return 0;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *memory) { memset(of, 0, sizeof *of); return 0; }
int cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = 0; return 0; }
int cudaDeviceGetPCIBusId(char *id, int size, int device) { strcpy(id, "0000:00:00.0"); return 0; }
int cudaDeviceGetDefaultMemPool(void **pool, int device) { *pool = 0; return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
  *function = 0;
  if (status) *status = 1;
  return 0;
}
const char *cudaGetErrorName(int error) { return "cudaErrorStandIn"; }
const char *cudaGetErrorString(int error) { return "an error of the stand-in"; }

int cuInit(unsigned flags) { return 0; }
int cuCtxGetCurrent(void **context) { *context = &handle; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
