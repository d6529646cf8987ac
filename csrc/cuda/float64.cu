#include "launch.h"

template cudaError_t launch_loss<double>(const DlbCudaArgs&);
template cudaError_t launch_rescale<double>(const DlbCudaArgs&);
