import torch

from trilith.plugins.dynamo import assume_constant_result


def test_a_constant_result_is_marked_as_torch_marks_it():
    def ours():
        return 1

    def theirs():
        return 1

    assert assume_constant_result(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}
