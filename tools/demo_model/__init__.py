# SPDX-License-Identifier: Apache-2.0
"""Training, export and evaluation of the ThriftAttention demo model."""
