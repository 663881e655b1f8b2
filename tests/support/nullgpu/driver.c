// The driver, libcuda.so.1: torch asks it for a context and for what it says about functions; nothing of it is real.
// Triton's kernels are launched through it, and counted with the runtime's.
#define NOTHING(name) int name(void) { return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)0x10; return 0; }
int cuGetErrorString(int error, const char **words) { *words = "no error: the card is a simulated one"; return 0; }

void null_launched(void); // runtime.c

int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { null_launched(); return 0; }

// Shared memory of a block and of a multiprocessor, for which Triton asks.
int cuDeviceGetAttribute(int *value, int which, int device) {
    if (which == 97 || which == 81)
        *value = 99 << 10;
    return 0;
}

// Threads of a block.
int cuFuncGetAttribute(int *value, int which, void *function) {
    if (which == 0)
        *value = 1024;
    return 0;
}

NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuInit)
NOTHING(cuLaunchCooperativeKernel)
NOTHING(cuLaunchKernel)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleLoad)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleLoadDataEx)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOTHING(cuPointerGetAttribute)
NOTHING(cuTensorMapEncodeTiled)
