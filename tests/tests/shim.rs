//! The shim at its own protocol, with containerd played by the test: in order, out of order, and with requests that make no
//! sense. After each test nothing may be left of it. One test at a time, as what is left is counted on the whole host.

mod shim_tests;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use tests::attempt;
use tests::containerd::remains::Remains;
use tests::shim::Player;

use crate::shim_tests::{
    disks, ends, events, logs, nonsense, observed, paused, races, refused, sandbox, silent,
};

type Test = (&'static str, fn(&Player));

const TESTS: [Test; 38] = [
    ("both_ways_to_start_a_shim", ends::both_ways),
    ("the_sandbox_service_from_end_to_end", sandbox::end_to_end),
    ("the_sandbox_service_out_of_order", sandbox::out_of_order),
    ("a_pod_ends_with_its_sandbox_alone", sandbox::shutdown_with_tasks),
    ("events_of_a_life_come_once_and_in_order", events::life),
    ("two_hundred_fast_processes_start_before_they_exit", events::fast),
    ("memory_that_runs_out_is_told_before_the_exit", events::oom),
    ("events_wait_for_a_containerd_that_is_away", events::away),
    ("what_was_added_to_a_deleted_container_is_told_of_once", events::added_outlive_the_first),
    ("requests_for_a_task_that_make_no_sense", nonsense::requests),
    ("processes_that_cannot_be_added", nonsense::additions),
    ("all_requests_for_a_task", nonsense::whole_service),
    ("a_paused_pod_refuses_what_it_could_not_answer", paused::whole_pod),
    ("a_paused_pod_is_stopped_in_order", paused::stopped_in_order),
    ("a_paused_container_begins_nothing", paused::container),
    ("a_pod_whose_guest_is_silent_can_be_ended", silent::ended),
    ("timings_of_a_pod_s_starts_are_told_until_its_end", observed::starts),
    ("a_person_execs_into_a_pod_and_reads_its_kernel_s_log", observed::by_hand),
    ("bundles_that_cannot_be_run", refused::bundles),
    ("what_a_pod_cannot_have_is_refused_by_name", refused::by_name),
    ("a_root_in_an_image_can_be_written", disks::writable_image),
    ("roots_in_images_that_are_read_only", disks::read_only_images),
    ("containers_of_a_pod_on_disks_come_and_go", disks::members),
    ("block_devices_of_the_host", disks::devices),
    ("disks_that_cannot_be_had_are_refused_by_name", disks::refused),
    ("a_killed_vmm_lets_go_of_its_disks", disks::vmm_killed),
    ("streams_that_are_no_fifos", refused::streams),
    ("output_is_appended_to_a_file", logs::file),
    ("output_goes_to_a_logging_program", logs::program),
    ("a_logging_program_that_stays_is_ended", logs::program_that_stays),
    ("one_of_many_creates_and_deletes_wins", races::create_and_delete),
    ("a_client_that_leaves_leaves_nothing_half_made", races::clients_that_leave),
    ("requests_for_a_pod_whose_vm_was_killed", ends::vm_killed),
    ("delete_after_the_shim_was_killed", ends::shim_killed),
    ("delete_of_a_shim_that_still_serves", ends::deleted_while_it_serves),
    ("a_shim_ends_with_its_vm_where_the_host_shuts_down", ends::host_shut_down),
    ("a_shim_begins_in_its_pods_cgroup", ends::cgroup),
    ("an_id_is_used_again_as_soon_as_its_shim_has_answered", ends::same_id_again),
];

fn main() -> ExitCode {
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let host = if arguments.list { None } else { tests::host() };
    let Some(host) = host else {
        let ignored = |(name, _): Test| Trial::test(name, || Ok(())).with_ignored_flag(true);
        return libtest_mimic::run(&arguments, TESTS.into_iter().map(ignored).collect()).exit_code();
    };
    let player = Arc::new(Player::new(host));
    let trials = TESTS.into_iter().map(|(name, test)| {
        let player = Arc::clone(&player);
        Trial::test(name, move || attempt(&player, test))
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn attempt(player: &Player, test: fn(&Player)) -> Result<(), Failed> {
    let before = Remains::now();
    attempt::attempt(|| test(player))?;
    let scratch = player.scratch.path().to_string_lossy().into_owned();
    let left = Remains::left_since(&before).into_iter().filter(|line| !line.contains(&scratch));
    let left: Vec<_> = left.collect();
    if left.is_empty() { Ok(()) } else { Err(format!("left behind:\n    {}", left.join("\n    ")).into()) }
}
