#include "launch.h"

template cudaError_t launch_loss<BFloat16>(const DlbCudaArgs&);
template cudaError_t launch_rescale<BFloat16>(const DlbCudaArgs&);
