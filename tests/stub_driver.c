// The CUDA driver as far as Triton uses it, without a GPU: modules load, launches are reported and compute nothing.
// Like a real driver it refuses more shared memory than the device has, or than a kernel was allowed to take.

#include <stdlib.h>
#include <string.h>

#include "cuda.h"

typedef struct {
  char name[256];
  unsigned shared;  // largest dynamic shared memory of a launch
} Function;

typedef void (*Report)(const char *name, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared);

static unsigned limit;
static Report report;

void stub_setup(unsigned shared_memory, Report on_launch) {
  limit = shared_memory;
  report = on_launch;
}

CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)&limit, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t *value, CUlimit what) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit what, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "refused by the stub", CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  int optin = which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
  *value = optin || which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? (int)limit : 1;
  return CUDA_SUCCESS;
}

// Host tensors stand in for those of a GPU.
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)image, CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
  Function *function = calloc(1, sizeof *function);
  if (!function) return CUDA_ERROR_OUT_OF_MEMORY;
  strncpy(function->name, name, sizeof function->name - 1);
  function->shared = 48 << 10;
  *found = (CUfunction)function;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if ((unsigned)value > limit) return CUDA_ERROR_INVALID_VALUE;
  ((Function *)function)->shared = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction launched, void **arguments, void **extra) {
  const Function *function = (const Function *)launched;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (config->sharedMemBytes > function->shared || threads > 1024 || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  report(function->name, config->gridDimX, config->gridDimY, config->gridDimZ, threads, config->sharedMemBytes);
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  return *clusters = 1, CUDA_SUCCESS;
}
