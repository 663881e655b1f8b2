// cuBLAS and what else of the CUDA runtime has nothing to answer. Without their headers: a caller passes what it likes.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

extern unsigned long launches;

#define NOTHING(name) int name(void) { return 0; }
#define PRODUCT(name) int name(void) { launches++; return 0; }
#define MAKE(name) int name(void **made) { *made = calloc(1, 256); return 0; }
#define UNMAKE(name) int name(void *made) { free(made); return 0; }

PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasLtMatmul)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemv_v2)

MAKE(cublasCreate_v2)
MAKE(cublasLtMatmulDescCreate)
MAKE(cublasLtMatmulPreferenceCreate)
MAKE(cublasLtMatrixLayoutCreate)
UNMAKE(cublasLtMatmulDescDestroy)
UNMAKE(cublasLtMatmulPreferenceDestroy)
UNMAKE(cublasLtMatrixLayoutDestroy)
NOTHING(cublasDestroy_v2) // torch keeps handles beyond their end

NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2)
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2)
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }

// cublasLtMatmulHeuristicResult_t: one way to compute, without a workspace.
typedef struct { unsigned long long algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, Heuristic *found, int *count) {
    memset(found, 0, sizeof *found);
    *count = 1;
    return 0;
}

NOTHING(cudaDeviceEnablePeerAccess)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaEventDestroy)
NOTHING(cudaEventQuery)
NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventSynchronize)
NOTHING(cudaFuncSetAttribute)
NOTHING(cudaMemcpyPeerAsync)
NOTHING(cudaMemcpyToSymbol)
NOTHING(cudaMemset)
NOTHING(cudaMemsetAsync)
NOTHING(cudaProfilerStart)
NOTHING(cudaProfilerStop)
NOTHING(cudaStreamDestroy)
NOTHING(cudaStreamQuery)
NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamWaitEvent)
NOTHING(cudaThreadExchangeStreamCaptureMode)
NOTHING(__cudaRegisterFatBinaryEnd)
NOTHING(__cudaRegisterFunction)
NOTHING(__cudaRegisterVar)
NOTHING(__cudaUnregisterFatBinary)
